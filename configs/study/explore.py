"""How the setting was chosen: clip-higher alone, on seeds and SFT checkpoints that no comparison
uses.

The safe rate is the lowest at which at least 5% of the tokens that can move are clipped; the high one
the highest at which the mean run of each checkpoint still ends above its start.
"""

from configs.study import setting


def get_study() -> setting.Study:
    return setting.Study(
        name="explore",
        question="At which rates does the clip bite, and does the baseline learn?",
        variants={
            f"clip_higher at {lr:g}": {"loss.kind": "clip_higher"} | setting.at(lr)
            for lr in (1e-4, 2e-4, 3e-4, 5e-4, 7e-4)
        },
        seeds=setting.EXPLORING_SEEDS,
        paper="math: 1e-6, 128 prompts x 8 samples, 16 prompts an update, so 8 updates",
    )
