"""Code GPPO with a reward for programs that pass all their tests, Fig. 3.

python -m klear_jax.train --config=configs/variants/hard_reward.py
"""

import ml_collections

from configs import gppo_code_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_code_8b.get_config()
    c.workdir = "runs/hard_reward"
    c.rewards.kinds.code.options.soft = False  # [P] 5.2.3.
    return c
