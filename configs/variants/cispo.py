"""Math RL with CISPO, the other baseline of Fig. 2.

python -m klear_jax.train --config=configs/variants/cispo.py
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/cispo"
    c.loss.kind = "cispo"  # [P] 5.2.1, App. A.1.
    c.loss.dual_clip = None  # [P] It has none.
    return c
