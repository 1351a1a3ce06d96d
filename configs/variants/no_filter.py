"""Math GPPO that keeps groups of equal rewards, Fig. 5.

python -m klear_jax.train --config=configs/variants/no_filter.py
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/no_filter"
    c.rollout.filter = "none"  # [P] 5.2.5.
    return c
