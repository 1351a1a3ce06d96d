"""Table 6 in miniature: how much of the LM loss on right samples, at a safe rate, and at the high
one, where it might keep GPPO from collapsing.

Measure and collapses as in clip.py.
"""

from configs.study import clip, setting


def get_study() -> setting.Study:
    return setting.Study(
        name="alpha",
        question="Does the LM loss on right samples help, and does it keep GPPO from breaking?",
        variants=setting.at_rates(
            {
                f"alpha {alpha:g}": {"loss.positive_coef": alpha}
                for alpha in (0.1, 0.0, 0.05, 0.2)
            },
            clip.RATES,
        ),
        seeds=range(16),
        paper="Table 6: AIME 2024 and 2025 after 100 steps, alpha 0: 78.13, 68.02; 0.05: 77.81, "
        "69.48; 0.1: 79.37, 70.42; 0.2: 78.44, 69.58",
    )
