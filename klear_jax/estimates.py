"""What is said of a model from its answers: unbiased estimates and their intervals.

Shape letters: P problems, N samples of each.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

BOOTSTRAP = 10_000  # Resamples of the problems for an interval.
SUBSETS = (
    200  # Of the samples of a problem, where there are more than one could go through.
)


def pass_at_k(correct_PN: np.ndarray, k: int) -> np.ndarray:
    """The chance that k of a problem's samples hold a right one, unbiased, [P].

    1 - C(n - c, k) / C(n, k) with c right ones (arXiv 2107.03374, Eq. 1).
    """
    n = correct_PN.shape[1]
    right_P = correct_PN.sum(axis=1)
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right_P])


def maj_at_k(
    votes_PN: np.ndarray | Sequence[Sequence[float]], correct_PN: np.ndarray, k: int
) -> np.ndarray:
    """The chance that the commonest answer among k of a problem's samples is right, [P].

    Right samples are of one answer; where answers are equally common, one of them is drawn.
    The mean over all subsets of k, or over SUBSETS random ones where there are more.

    Args:
        votes_PN: a number for each answer, 0 for a sample without one, which has no vote.
    """
    rng = np.random.default_rng(0)
    n = correct_PN.shape[1]
    chances = []
    for votes, correct_N in zip(votes_PN, correct_PN, strict=True):
        ballot = np.array(
            [
                "right" if right else vote
                for vote, right in zip(votes, correct_N, strict=True)
            ],
            object,
        )
        subsets = (
            list(itertools.combinations(range(n), k))
            if math.comb(n, k) <= SUBSETS
            else [rng.choice(n, k, replace=False) for _ in range(SUBSETS)]
        )
        chances.append(np.mean([_wins(ballot[list(subset)]) for subset in subsets]))
    return np.array(chances)


def _wins(ballot: np.ndarray) -> float:
    """The chance of 'right' to be drawn from the commonest."""
    counts = Counter(vote for vote in ballot if vote)
    most = max(counts.values(), default=0)
    winners = [vote for vote, count in counts.items() if count == most]
    return ("right" in winners) / max(len(winners), 1)


def interval(name: str, value_P: np.ndarray) -> dict[str, float]:
    """The mean over problems and its 95% bootstrap interval: name, name_low, name_high."""
    rng = np.random.default_rng(0)
    num = len(value_P)
    means = [value_P[rng.integers(num, size=num)].mean() for _ in range(BOOTSTRAP)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        name: float(value_P.mean()),
        f"{name}_low": float(low),
        f"{name}_high": float(high),
    }
