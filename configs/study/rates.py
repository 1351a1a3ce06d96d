"""GPPO against clip-higher over learning rates, from one that clips few tokens to one that clips
many: where does the difference of clip.py begin? The two upper rates are clip.py's runs."""

from configs.study import clip, setting


def get_study() -> setting.Study:
    return setting.Study(
        name="rates",
        question="From which rate on do GPPO and clip-higher differ?",
        variants=setting.at_rates(
            {name: clip.CLIPS[name] for name in ("clip_higher", "gppo")},
            {f"{lr:g}": lr for lr in (1e-4, 2e-4, setting.SAFE_LR, setting.HIGH_LR)},
        ),
        seeds=range(16),
        paper="its rate is 1e-6 for 8B parameters; it has no second one",
    )
