"""Math GPPO without the LM loss on positive samples, Table 6.

python -m klear_jax.train --config=configs/variants/alpha_0.py
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/alpha_0"
    c.loss.positive_coef = 0.0  # [P] Table 6.
    return c
