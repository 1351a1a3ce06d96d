"""Fig. 5 in miniature: groups of equal rewards, left out or kept.

Their advantages are 0, so that the policy loss learns nothing from them. Kept, they still have
three effects: the other groups' share of an update is smaller, for the mean is over all tokens; there
are always 8 updates a batch, where the filter leaves 5.7 in the mean; and of groups that are all right
the LM loss learns, but for alpha 0. With mini-batches of 6 prompts there are 6 updates, about as many
as the filter leaves.
"""

from configs.study import setting


def get_study() -> setting.Study:
    return setting.Study(
        name="filter",
        question="Does leaving out groups that teach nothing help?",
        variants={
            f"{name}, alpha {alpha:g}": filter_ | {"loss.positive_coef": alpha}
            for alpha in (0.1, 0.0)
            for name, filter_ in (
                ("filter", {}),
                ("no filter", {"rollout.filter": "none"}),
                (
                    "no filter but 6 updates",
                    {"rollout.filter": "none", "minibatch_prompts": 6},
                ),
            )
        },
        seeds=range(16),
        paper="Fig. 5a: AIME 2024, mean of the last five: 80.4 with the filter, 78.1 without",
    )
