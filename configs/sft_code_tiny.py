"""SFT of a small model from scratch, on sums and on small programs: minutes on a laptop.

    python -m klear_jax.prepare_data --output=runs/data_code --task=chain_sum,programs
    python -m klear_jax.train --config=configs/sft_code_tiny.py

The programs are of klear_jax/data/programs.py. Half of the demonstrations plan first; the
others write the program at once, and most of these have one part wrong. Keys that are not
here are those of sft_tiny.
"""

import ml_collections

from configs import sft_tiny


def get_config() -> ml_collections.ConfigDict:
    c = sft_tiny.get_config()
    c.workdir = "runs/sft_code_tiny"
    c.tokenizer = "runs/data_code/tokenizer"
    c.data.path = "runs/data_code/arithmetic/1.0.0,runs/data_code/programs/1.0.0"
    c.model.vocab_size = 384  # Programs have more words of their own.
    c.data.row_tokens = 96
    c.num_steps = 500
    c.rewards.kind = "code"
    c.evaluation.data = "runs/data_code/programs/1.0.0"
    c.evaluation.num_problems = 256
    c.evaluation.num_samples = 4
    c.evaluation.max_prompt_tokens = 32
    c.evaluation.max_new_tokens = 56
    return c
