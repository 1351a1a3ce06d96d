"""SFT of SmolLM2-135M-Instruct on worked-out word problems, on two cores.

    bash launch/smollm2_sft.sh

makes the problems and their data set, and calls this. What to expect is in
tests/bench/RESULTS.md. All numbers are ours, chosen for two cores of CPU.
"""

import ml_collections

from configs import gppo_smollm2, sections, sft_tiny


def get_config() -> ml_collections.ConfigDict:
    c = sft_tiny.get_config()  # Keys that are not named here are explained there.
    model = gppo_smollm2.get_config()
    c.workdir = "runs/gsm_symbolic/run"
    c.init_from = model.init_from
    c.tokenizer = model.tokenizer
    c.model = model.model
    c.remat = "dots"

    c.data.path = "runs/gsm_symbolic/sft/1.0.0"
    c.data.split = "train"
    c.data.row_tokens = 512
    c.batch_rows = 8  # About 18 problems.
    c.micro_rows = 8
    c.num_steps = 80  # Of about 30 s each.

    c.optim.peak_lr = 2e-4
    c.optim.end_lr = 2e-5
    c.optim.decay = "cosine"
    c.optim.decay_start = 0.0
    c.optim.warmup_steps = 10
    c.optim.warmup_from = 0.1

    c.validation.split = "validation"
    c.validation.every = 20
    c.validation.batches = 2

    c.sampler = sections.sampler(
        num_slots=64, page_tokens=16, pool_tokens=None, prefill_tokens=512
    )
    c.rewards = model.rewards
    c.evaluation.data = "runs/gsm_symbolic/raw/seen.jsonl"
    c.evaluation.split = ""
    c.evaluation.num_problems = 128
    c.evaluation.num_samples = 0  # Greedy alone.
    c.evaluation.max_prompt_tokens = 256
    c.evaluation.max_new_tokens = 320
    c.checkpoint.every = 20  # Of 1.6 GB each.
    c.checkpoint.keep = 1
    return c
