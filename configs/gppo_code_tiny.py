"""Code GPPO of the model that sft_code_tiny made, through the real sandbox, on a laptop.

    python -m klear_jax.train --config=configs/gppo_code_tiny.py

The model writes a program for a problem it has never seen; its reward is the share of 16
tests that pass (2p - 1). With --config.rewards.kinds.code.options.soft=False all must pass.
Wants bubblewrap (klear_jax/rewards/sandbox.py). Keys that are not here are those of
gppo_tiny; after a math stage, --config.init_from is that stage's workdir.
"""

import ml_collections

from configs import gppo_tiny, sections, sft_code_tiny


def get_config() -> ml_collections.ConfigDict:
    sft = sft_code_tiny.get_config()
    c = gppo_tiny.get_config()
    c.workdir = "runs/gppo_code_tiny"
    c.init_from = "runs/sft_code_tiny"  # A Hugging Face folder or a workdir.
    c.tokenizer = sft.tokenizer
    c.model = sft.model
    c.data.path = "runs/data_code/programs/1.0.0"
    c.rollout.prompts = 32
    c.rollout.max_groups = 16
    c.rollout.max_prompt_tokens = sft.evaluation.max_prompt_tokens
    c.rollout.max_new_tokens = sft.evaluation.max_new_tokens
    c.rewards = sft.rewards
    c.loss = sections.gppo_loss()  # GPPO on both sides, with which it was measured.
    c.minibatch_prompts = 4
    c.micro_rows = 32
    c.num_steps = 30
    c.optim.peak_lr = c.optim.end_lr = 2e-4
    c.evaluation = sft.evaluation
    return c
