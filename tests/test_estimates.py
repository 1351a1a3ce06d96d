"""Estimates against their definitions: means over all subsets, and the normal distribution."""

import itertools
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from klear_jax import estimates


@hypothesis.given(
    rows=st.integers(1, 7).flatmap(
        lambda n: st.lists(
            st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4
        )
    ),
    data=st.data(),
)
def test_pass_at_k_is_the_mean_over_all_subsets(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    want = [np.mean([any(s) for s in itertools.combinations(row, k)]) for row in rows]
    got = estimates.pass_at_k(np.array(rows), k)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_interval_is_95_percent_of_a_normal_and_shrinks():
    rng = np.random.default_rng(0)
    widths = []
    for num in (100, 1600):
        values = rng.integers(0, 9, num) / 8
        got = estimates.interval("x", values)
        assert list(got) == ["x", "x_low", "x_high"]
        assert got["x_low"] < got["x"] < got["x_high"]
        assert got["x"] == values.mean()
        half = 1.96 * values.std() / np.sqrt(num)
        assert got["x_low"] == pytest.approx(got["x"] - half, abs=0.1 * half)
        assert got["x_high"] == pytest.approx(got["x"] + half, abs=0.1 * half)
        assert got == estimates.interval("x", values)
        widths.append(got["x_high"] - got["x_low"])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)
    assert set(estimates.interval("x", np.ones(7)).values()) == {1.0}


def majority(ballot, k):
    """The mean over all subsets of k; 3 is right, 0 no answer, a tie is worth its share."""

    def share(subset):
        counts = Counter(vote for vote in subset if vote)
        best = [vote for vote in counts if counts[vote] == max(counts.values())]
        return (3 in best) / len(best) if best else 0

    return np.mean([share(subset) for subset in itertools.combinations(ballot, k)])


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    ballots=st.lists(
        st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=3
    ),
    k=st.integers(1, 5),
)
def test_maj_at_k_is_the_mean_over_subsets_and_ties(ballots, k):
    got = estimates.maj_at_k(ballots, np.array(ballots) == 3, k)
    want = [majority(ballot, k) for ballot in ballots]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_of_too_many_subsets_some_are_drawn(ballot):
    correct = np.array([ballot]) == 3
    got = estimates.maj_at_k([ballot], correct, 6)
    # Five standard errors of a mean over the subsets, at most.
    atol = 5 * 0.5 / np.sqrt(estimates.SUBSETS)
    np.testing.assert_allclose(got, majority(ballot, 6), rtol=0, atol=atol)
    np.testing.assert_array_equal(got, estimates.maj_at_k([ballot], correct, 6))


def test_right_answers_are_one_however_they_are_written():
    got = estimates.maj_at_k(
        [[5.0, 6.0, 7.0, 7.0, 8.0]], np.array([[1, 1, 0, 0, 1]]), 5
    )
    assert got.tolist() == [1.0]
