"""Fig. 2 in miniature: which clip, at a safe and at a high learning rate.

Stated before it was run, from exploratory runs of a prototype: at the high rate GPPO (1, 1)
collapses more often than clip-higher, and CE-GPPO (0.25, 1) does not; at the safe rate they
are alike. Measure: avg@8 of held-out problems after the last step; a collapse is a run that
ends below the accuracy of the checkpoint that it began with.
"""

from configs.study import setting

CLIPS = {
    "clip_higher": {"loss.kind": "clip_higher"},
    "gppo": {"loss.kind": "gppo"},
    "cispo": {"loss.kind": "cispo", "loss.dual_clip": None},
    "ce_gppo": {"loss.kind": "gppo", "loss.beta_low": 0.25},
    "only_high": {"loss.kind": "gppo_only_high"},
}
RATES = {"safe": setting.SAFE_LR, "high": setting.HIGH_LR}


def get_study() -> setting.Study:
    return setting.Study(
        name="clip",
        question="Which clip learns best, and which one breaks?",
        variants=setting.at_rates(CLIPS, RATES),
        seeds=range(32),
        paper="Fig. 2a: AIME 2024 avg@32, mean of the last five evaluations: clip-higher 79.1, "
        "CISPO 80.0, GPPO 81.3",
    )
