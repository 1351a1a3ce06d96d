"""What the study of code rewards runs: gppo_code_tiny, ended before all of it is learnt.

The model writes a program for a problem it has never seen; 16 tests judge it, in the sandbox.
"""

import ml_collections

from configs import gppo_code_tiny, sft_code_tiny
from configs.study import setting

DATA_FLAGS = ("--output=runs/study/data_code", "--task=chain_sum,programs")


def get_sft_config(seed: int) -> ml_collections.ConfigDict:
    """Of a checkpoint that runs start from: as sft_code_tiny."""
    c = sft_code_tiny.get_config()
    sums = "runs/study/data_code/arithmetic/1.0.0"
    c.evaluation.data = "runs/study/data_code/programs/1.0.0"
    c.data.path = f"{sums},{c.evaluation.data}"
    c.tokenizer = "runs/study/data_code/tokenizer"
    c.seed = seed
    c.workdir = f"runs/study/sft_code_{seed}"
    return c


def get_config() -> ml_collections.ConfigDict:
    """Of a run, but for its seed, its checkpoint, and what its variant says."""
    c = gppo_code_tiny.get_config()
    c.data.path = c.evaluation.data = "runs/study/data_code/programs/1.0.0"
    c.tokenizer = "runs/study/data_code/tokenizer"
    setting.study(c)
    c.rollout.token_groups = c.rollout.max_groups  # All, as in setting.py.
    c.num_steps = c.evaluation.every = 5  # See explore_soft.py.
    c.evaluation.num_samples = 8
    return c
