"""Group-relative advantages against the authors' numbers and their own definition."""

import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from klear_jax import advantages

GOLDEN = pathlib.Path(__file__).parent / "golden"
ARRAYS = dict(np.load(GOLDEN / "grpo_advantage.npz"))
CASES = json.loads((GOLDEN / "grpo_advantage.json").read_text())


@pytest.mark.parametrize("row", CASES, ids=lambda row: row["case"])
def test_group_relative_is_the_authors(row):
    case = row["case"]
    reward, group_id = ARRAYS[f"{case}/reward"], ARRAYS[f"{case}/group_id"]
    got = advantages.group_relative(
        reward, group_id, normalize_std=row["normalize_std"], eps=row["eps"]
    )
    assert got.dtype == np.float32
    if "zero_var" in case:
        # Equal rewards: theirs is the rounding of the mean over eps, up to 0.06.
        assert not got.any()
        np.testing.assert_allclose(ARRAYS[f"{case}/advantage"], 0, atol=0.1)
    else:
        # Of a tiny variance their float32 keeps two digits: compare with their float64.
        key = "advantage_f64" if "tiny_var" in case else "advantage"
        np.testing.assert_allclose(got, ARRAYS[f"{case}/{key}"], rtol=2e-6, atol=2e-7)


def test_one_right_of_eight():
    reward = [-1, -1, -1, 1, -1, -1, -1, -1]
    want = [-0.3536] * 3 + [2.4749] + [-0.3536] * 4
    np.testing.assert_allclose(
        advantages.group_relative(reward, [5] * 8), want, atol=5e-5
    )


@pytest.mark.parametrize(
    "reward, group_id, normalize_std, want",
    [
        ([1, -1], [0, 0], True, [0.5**0.5, -(0.5**0.5)]),
        ([1, -1], [0, 0], False, [1, -1]),
        ([1.0, 0.5, 0.0, 0.5], [0] * 4, False, [0.5, 0, -0.5, 0]),
        ([-1, 0.5], [0, 1], True, [-1, 0.5]),  # Groups of one keep their reward.
        ([-1, 0.5], [0, 1], False, [-1, 0.5]),
        ([0.1] * 7, [0] * 7, True, [0] * 7),
        ([], [], True, []),
    ],
)
def test_group_relative_by_hand(reward, group_id, normalize_std, want):
    got = advantages.group_relative(reward, group_id, normalize_std=normalize_std)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_array_equal(got == 0, np.asarray(want) == 0)


# (group, reward) of each sample, in any order; full credit, wrong, soft, unfinished.
SAMPLES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([1.0, -1.0, -0.5, 0.75, 0.1])),
    max_size=24,
)


@hypothesis.given(samples=SAMPLES, data=st.data())
def test_neither_order_nor_names_of_groups_matter(samples, data):
    group_id, reward = np.array(samples, float).reshape(-1, 2).T
    want = advantages.group_relative(reward, group_id)
    order = np.array(data.draw(st.permutations(range(len(samples)))), int)
    names = np.array(data.draw(st.permutations(range(5))))
    got = advantages.group_relative(reward[order], names[group_id.astype(int)][order])
    np.testing.assert_array_max_ulp(got, want[order], 1)

    keep = advantages.informative(reward, group_id)
    for group in set(group_id):
        rows = group_id == group
        rewards = reward[rows]
        if len(rewards) == 1:
            assert keep[rows].all()
        elif len(set(rewards)) == 1:
            assert not want[rows].any() and not keep[rows].any()
        else:
            assert keep[rows].all()
            assert abs(want[rows].mean()) < 1e-6
            assert want[rows].std(ddof=1) == pytest.approx(1, abs=1e-5)
            np.testing.assert_array_equal(np.argsort(want[rows]), np.argsort(rewards))


def test_groups_come_in_order_of_first_appearance():
    got = advantages.groups(np.array([7, 2, 7, -1, 2, 7]))
    assert [rows.tolist() for rows in got] == [[0, 2, 5], [1, 4], [3]]
    assert advantages.groups(np.array([], int)) == []


@hypothesis.given(st.lists(st.integers(-3, 3), max_size=20))
def test_groups_are_a_partition(group_id):
    got = [rows.tolist() for rows in advantages.groups(np.array(group_id, int))]
    want = {}
    for i, group in enumerate(group_id):
        want.setdefault(group, []).append(i)
    assert got == list(want.values())


def test_informative_by_reward_and_by_accuracy():
    """By reward the paper's filter; by accuracy the authors' code drops more."""
    rewards = {
        "all right": [1.0, 1.0],
        "all wrong": [-1.0, -1.0],
        "mixed": [1.0, -1.0],
        "soft, none full": [0.5, -0.25],
        "soft, one full": [1.0, 0.5],
        "wrong and unfinished": [-1.0, -0.5],
    }
    reward, group_id = np.ravel(list(rewards.values())), np.repeat(range(6), 2)
    reward, group_id = (
        np.append(reward, -1.0),
        np.append(group_id, 6),
    )  # A lone wrong answer.
    by_reward = advantages.informative(reward, group_id)
    by_accuracy = advantages.informative(reward == 1.0, group_id)
    assert by_reward.dtype == by_accuracy.dtype == bool
    assert by_reward.tolist() == [False] * 4 + [True] * 9
    assert by_accuracy.tolist() == [False] * 4 + [True] * 2 + [False] * 2 + [
        True
    ] * 2 + [False] * 2 + [True]
    # What is dropped by reward is what teaches nothing.
    np.testing.assert_array_equal(
        advantages.group_relative(reward, group_id) != 0, by_reward
    )
