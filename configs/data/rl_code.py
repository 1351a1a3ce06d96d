"""KlearReasoner-CodeSub-15K, as published -> a data set for configs/gppo_code_8b.py.

    python -m klear_jax.prepare_data --config=configs/data/rl_code.py

As rl_math, but for at least 16 tests, and without the problems of LiveCodeBench, whose published
rows must be there. Sources: [P] the paper, arXiv 2508.07629.
"""

import ml_collections

from configs import sections
from configs.data import rl_math


def get_config() -> ml_collections.ConfigDict:
    c = rl_math.get_config()
    c.name = "klear_rl_code"
    c.sources = ml_collections.ConfigDict()
    c.sources.klear = sections.source("raw/KlearReasoner-CodeSub-15K*", "klear_rl")
    c.clean.min_tests = 16  # [P]
    # What gppo_code_8b evaluates on.
    c.clean.benchmarks += ("data/livecodebench_v5.jsonl",)  # [P]
    return c
