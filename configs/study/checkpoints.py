"""The main comparison of clip.py on twelve other SFT checkpoints, for four are few.

Stated before it was run: over the checkpoints, GPPO ends below clip-higher at both rates, and
without the low side's gradient it does not. Measure: the mean of the checkpoints' differences, two
pairs each, with Student's interval over the twelve. From how much the four of clip.py differ from
each other (6 and 14 points), twelve would show 5 and 12 points.
"""

from configs.study import clip, setting


def get_study() -> setting.Study:
    return setting.Study(
        name="checkpoints",
        question="Does it hold on other checkpoints?",
        variants=setting.at_rates(
            {name: clip.CLIPS[name] for name in ("clip_higher", "gppo", "only_high")},
            clip.RATES,
        ),
        seeds=setting.OTHER_SEEDS,
        paper="one checkpoint, one run of each",
    )
