"""Worked-out word problems -> the data set of configs/sft_smollm2.py.

    python launch/gsm_symbolic.py runs/gsm_symbolic/raw
    python -m klear_jax.prepare_data --config=configs/data/gsm_symbolic.py

The responses are judged, and those that miss the answer are left out. All numbers are ours.
"""

import ml_collections

from configs import gppo_smollm2, sections
from configs.data import sft


def get_config() -> ml_collections.ConfigDict:
    c = sft.get_config()  # Keys that are not named here are explained there.
    c.output = "runs/gsm_symbolic"
    c.name = "sft"
    c.tokenizer = "runs/smollm2/model"
    c.sources = ml_collections.ConfigDict()
    c.sources.gsm_symbolic = sections.source("runs/gsm_symbolic/raw/train.jsonl", "any")
    c.clean.think = "any"  # The model does not think in tags.
    c.clean.max_tokens = 512
    c.clean.benchmarks = (  # No problem to test on, nor a phrase of one: templates repeat.
        "runs/gsm_symbolic/raw/unseen.jsonl",
    )
    c.clean.allowed = ("Give the result as your final answer. Do not include units.",)
    c.choose.judge = True
    c.choose.only_right = True
    c.choose.responses_per_prompt = 1
    c.choose.validation_percent = 3.0
    c.rewards = gppo_smollm2.get_config().rewards  # The last number.
    return c
