"""Math GPPO that keeps a quarter of the gradient below: CE-GPPO, Eq. 17.

python -m klear_jax.train --config=configs/variants/ce_gppo.py
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/ce_gppo"
    c.loss.beta_low, c.loss.beta_high = 0.25, 1.0  # [R] Against entropy collapse.
    return c
