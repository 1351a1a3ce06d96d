"""KlearReasoner-MathSub-30K, as published -> a data set for configs/gppo_8b.py.

    python -m klear_jax.prepare_data --config=configs/data/rl_math.py
    python -m klear_jax.train --config=configs/gppo_8b.py \\
        --config.data.path=data/klear_rl_math/1.0.0 --config.data.split=train

without duplicates, and without what benchmarks hold; it can be trained on as published, too.

To choose by your own model's pass rates, as the paper did by DeepSeek-R1's: write samples by

    python -m klear_jax.evaluate --config=configs/gppo_8b.py --model=MODEL \\
        --config.evaluation.data=raw/math.parquet --config.evaluation.num_samples=16 \\
        --samples=raw/samples.jsonl

and add --config.choose.pass_rates=raw/samples.jsonl --config.choose.pass_rate_above=0.5, the
paper's majority of 16; pass_rate_below=1.0 drops what is always right.

Sources: [P] the paper, arXiv 2508.07629; [R] the authors' recipe; [ours].
"""

import ml_collections

from configs import sections
from configs.data import sft


def get_config() -> ml_collections.ConfigDict:
    c = sft.get_config()
    c.name = "klear_rl_math"
    c.kind = "rl"
    c.sources = ml_collections.ConfigDict()
    c.sources.klear = sections.source("raw/KlearReasoner-MathSub-30K*", "klear_rl")
    c.clean.think = "any"  # There are no responses.
    c.clean.max_tokens = 0  # There are no responses.
    c.choose.responses_per_prompt = 0  # There are no responses.
    c.choose.validation_percent = 0.0  # [R] It evaluates on benchmarks.
    return c
