"""Math GPPO without GPPO: clip-higher, the baseline of Fig. 2.

python -m klear_jax.train --config=configs/variants/clip_higher.py
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/clip_higher"
    c.loss.kind = "clip_higher"  # [P] 5.2.1. No gradient beyond the bounds.
    return c
