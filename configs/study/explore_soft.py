"""How long the runs of soft.py are: on the hard reward alone, on seeds and SFT checkpoints that no
comparison uses. They end where the mean of the samples is about 85% right, so that there is room.
"""

from configs.study import setting, soft


def get_study() -> setting.Study:
    return setting.Study(
        name="explore_soft",
        question="How soon are programs learnt?",
        variants={
            "hard, 30 steps": soft.HARD | {"num_steps": 30, "evaluation.every": 30}
        },
        seeds=setting.EXPLORING_SEEDS[:4],
        paper="Fig. 3b: rewards in training, first and last ten steps of 100: hard 0.00 and 0.10, "
        "soft 0.10 and 0.40",
        setting="programs",
    )
