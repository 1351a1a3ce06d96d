"""The bound of ratios where the advantage is negative: none, 10 (the authors' recipe), 3, and 3 with
its gradient kept, as GPPO keeps it at the other bounds, which nobody seems to have tried."""

from configs.study import setting

DUALS = {
    "dual 10": {},
    "no dual clip": {"loss.dual_clip": None},
    "dual 3": {"loss.dual_clip": 3.0},
    "dual 3 with its gradient": {"loss.dual_clip": 3.0, "loss.beta_dual": 1.0},
}


def get_study() -> setting.Study:
    return setting.Study(
        name="dual",
        question="Does a bound for A < 0 help, and does keeping its gradient?",
        variants={
            name: values | setting.at(setting.HIGH_LR) for name, values in DUALS.items()
        },
        seeds=range(16),
        paper="no word of it; the released recipe has 10",
    )
