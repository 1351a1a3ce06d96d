"""Fig. 5 in miniature: groups of equal rewards, left out or kept.

Their advantages are 0, so they teach nothing by themselves; kept, they make the other groups'
share of an update smaller, for the mean is over all tokens.
"""

from configs.study import setting


def get_study() -> setting.Study:
    return setting.Study(
        name="filter",
        question="Does leaving out groups that teach nothing help?",
        variants={"filter": {}, "no filter": {"rollout.filter": "none"}},
        seeds=range(16),
        paper="Fig. 5a: AIME 2024, mean of the last five: 80.4 with the filter, 78.1 without",
    )
