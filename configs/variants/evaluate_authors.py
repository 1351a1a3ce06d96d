"""Klear-Reasoner-8B as the authors' script evaluates, which adds to the paper's settings.

    python -m klear_jax.evaluate --config=configs/variants/evaluate_authors.py \
        --model=gs://BUCKET/gppo_code_8b --output=results/authors.json

Their benchmarks/inference.py always has YaRN and 64K tokens, and draws from the 20 likeliest
tokens with a penalty on those that were said. (The paper names neither.)
"""

import ml_collections

from configs.variants import evaluate_64k


def get_config() -> ml_collections.ConfigDict:
    c = evaluate_64k.get_config()
    c.evaluation.top_k = 20  # [R]
    c.evaluation.repetition_penalty = 1.05  # [R]
    c.evaluation.seed = 0  # [R]
    return c
