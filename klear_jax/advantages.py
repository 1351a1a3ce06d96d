"""Group-relative advantages and group filters: numpy, on the host.

A group is the samples of one prompt. Source: Eq. 4 of arXiv 2508.07629 with the standard
deviation of the authors' code (unbiased, + 1e-6); filters from its section 5.2.5.
"""

import numpy as np

from klear_jax.errors import InputError


def group_relative(
    rewards_B: np.ndarray,
    group_ids_B: np.ndarray,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> np.ndarray:
    """(reward - mean of its group) / (unbiased std of its group + eps).

    Exactly 0 where all rewards of a group are equal, so that rounding of their mean is
    not blown up by eps. A group of one keeps its reward (mean 0, std 1), as in the
    authors' code.

    Args:
        rewards_B: one reward a sample.
        group_ids_B: which group a sample belongs to; any hashable integers.
        normalize_std: divide by the standard deviation, or only subtract the mean.
        eps: added to the standard deviation.

    Returns:
        advantage_B, float32, in standard deviations (or in rewards).
    """
    rewards_B = np.asarray(rewards_B, np.float64)
    if rewards_B.shape != np.shape(group_ids_B):
        raise InputError(
            f"each reward needs its group: {rewards_B.shape} rewards, "
            f"{np.shape(group_ids_B)} group ids"
        )
    advantage_B = np.zeros(rewards_B.shape, np.float64)
    for rows in groups(group_ids_B):
        reward_R = np.sort(rewards_B[rows])  # The order of arrival changes no bit.
        if len(rows) == 1:
            mean, std = 0.0, 1.0
        elif reward_R[0] == reward_R[-1]:
            continue
        else:
            mean, std = reward_R.mean(), reward_R.std(ddof=1)
        advantage_B[rows] = (rewards_B[rows] - mean) / (
            (std + eps) if normalize_std else 1.0
        )
    return advantage_B.astype(np.float32)


def groups(group_ids_B: np.ndarray) -> list[np.ndarray]:
    """The row indices of each group, groups in order of first appearance."""
    _, first, inverse_B = np.unique(group_ids_B, return_index=True, return_inverse=True)
    order_B = np.argsort(inverse_B, kind="stable")
    split = np.split(order_B, np.cumsum(np.bincount(inverse_B))[:-1])
    return [split[i] for i in np.argsort(first)]


def informative(score_B: np.ndarray, group_ids_B: np.ndarray) -> np.ndarray:
    """Which rows belong to a group whose scores differ, [B] bool.

    The others have advantage 0 and teach nothing. With rewards as the score this is the
    paper's filter (section 5.2.5); with accuracy (reward == full credit) it is the
    authors' code, which also drops groups of different but never full rewards. A group
    of one always stays.
    """
    score_B = np.asarray(score_B)
    keep_B = np.zeros(len(score_B), bool)
    for rows in groups(group_ids_B):
        keep_B[rows] = len(rows) == 1 or score_B[rows].max() > score_B[rows].min()
    return keep_B


def group_mean(x_B: np.ndarray, group_ids_B: np.ndarray) -> np.ndarray:
    """The mean of each row's group, [B] float64."""
    mean_B = np.zeros(len(x_B), np.float64)
    for rows in groups(group_ids_B):
        mean_B[rows] = np.mean(np.asarray(x_B)[rows])
    return mean_B
