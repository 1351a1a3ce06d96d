"""What the gradient of the low side does: beta_low alone, at the high rate, where GPPO breaks.

1 is GPPO. 0 keeps none of it, and all of the high side's: that is 'gppo_only_high', from which it
differs in the value of the loss alone.
"""

from configs.study import setting


def get_study() -> setting.Study:
    high = setting.at(setting.HIGH_LR)
    return setting.Study(
        name="beta_low",
        question="How much of the low side's gradient is too much?",
        variants={
            "beta_low 1": high,
            "beta_low 0": high | {"loss.kind": "gppo_only_high"},
            **{
                f"beta_low {beta:g}": high | {"loss.beta_low": beta}
                for beta in (0.1, 0.25, 0.5)
            },
        },
        seeds=range(32),
        paper="the authors' README: 0.25 or 0.5 against entropy collapse",
    )
