"""Klear-Reasoner-8B with a budget of 64K tokens, as the last row of the paper's Table 1.

    python -m klear_jax.evaluate --config=configs/variants/evaluate_64k.py \
        --model=gs://BUCKET/gppo_code_8b --output=results/64k.json
    python -m klear_jax.plan --config=configs/variants/evaluate_64k.py --topology=v5p:4x4x4

To compare with: avg@64 of AIME 2024 90.5, AIME 2025 83.2, HMMT 2025 70.8 (in 32K: 83.2, 75.6,
60.3). The model was trained on up to 36,864 positions; YaRN stretches them.
"""

import dataclasses

import ml_collections

from configs.variants import evaluate_paper
from klear_jax import qwen3

YARN = qwen3.Yarn(
    factor=2.5,  # [P]
    original_max_positions=32_768,  # [P]
)


def get_config() -> ml_collections.ConfigDict:
    c = evaluate_paper.get_config()
    c.model.yarn = ml_collections.ConfigDict(dataclasses.asdict(YARN))
    c.model.max_positions = 81_920  # [P] 2.5 times as many.
    c.evaluation.max_new_tokens = 65_536  # [P]
    return c
