"""Math GPPO above the upper bound only, a hard clip below.

python -m klear_jax.train --config=configs/variants/only_high.py
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/only_high"
    c.loss.kind = "gppo_only_high"  # [R] perf_run_dapo_ours_math_only_high.sh.
    return c
