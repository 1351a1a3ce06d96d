"""What the gradient of the low side does: beta_low alone, at the high rate, where GPPO breaks.

0 keeps none of it, as clip-higher does on that side, but for the value; 1 is GPPO.
"""

from configs.study import setting


def get_study() -> setting.Study:
    return setting.Study(
        name="beta_low",
        question="How much of the low side's gradient is too much?",
        variants={
            f"beta_low {beta:g}": {
                "loss.beta_low": beta,
                "optim.peak_lr": setting.HIGH_LR,
                "optim.end_lr": setting.HIGH_LR,
            }
            for beta in (1.0, 0.0, 0.1, 0.25, 0.5)
        },
        seeds=range(32),
        paper="the authors' README: 0.25 or 0.5 against entropy collapse",
    )
