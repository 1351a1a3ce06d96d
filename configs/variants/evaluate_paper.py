"""Klear-Reasoner-8B on the paper's math benchmarks, as its Table 1: avg@64 in 32K tokens.

    python -m klear_jax.evaluate --config=configs/variants/evaluate_paper.py \
        --model=gs://BUCKET/gppo_code_8b --output=results/paper.json

To compare with, avg@64 of AIME 2024, AIME 2025, HMMT 2025: 83.2, 75.6, 60.3; of the SFT model
75.6, 70.1, 57.6. For code, avg@8 of LiveCodeBench v5 and v6 (61.6 and 53.1; SFT 58.5, 49.6),
with the rows of its release as they are:

    --config.evaluation.data=data/livecodebench.jsonl --config.evaluation.num_samples=8 \
        --config.evaluation.since=2024-08-01 --config.evaluation.until=2025-01-31
    (v6: 2025-02-01 to 2025-05-31 [ours]: the paper gives months, which meet in February)
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()  # Sources, and keys that are not named here, stand there.
    c.evaluation.data = (  # [P] The authors' files.
        "data/aime24.qs.jsonl,data/aime25.qs.jsonl,data/HMMT-202502.jsonl"
    )
    c.evaluation.num_samples = 64  # [P] Of LiveCodeBench 8.
    c.evaluation.temperature = 0.6  # [P]
    c.evaluation.top_p = 0.95  # [P]
    c.evaluation.max_new_tokens = 32_768  # [P]
    return c
