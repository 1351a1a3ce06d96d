"""From a rollout to rows: what is chosen, laid out, weighed, counted and written down."""

import dataclasses
import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from test_rollout import CONFIG, REWARDS

from klear_jax import advantages, batch, losses, rollout, sampler
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Outcome

GOLDEN = pathlib.Path(__file__).parent / "golden"


def make(scores, group_size=3, lengths=None, finished=None, waited=(), penalty_B=None):
    """A rollout of those scores; sample b has prompt [g + 1] * (g % 4 + 1)."""
    scores = np.float32(scores)
    B = len(scores)
    group_B = np.arange(B) // group_size
    lengths = lengths or [b % 6 + 1 for b in range(B)]
    samples = [
        sampler.Sample(
            tokens=[100 * (b + 1) + t for t in range(n)],
            logprobs=-np.float32([b + t / 8 for t in range(n)]),
            finished=finished[b] if finished else b % 2 == 0,
        )
        for b, n in enumerate(lengths)
    ]
    outcomes = [
        Outcome(float(r), "ok" if np.isfinite(r) else "error", "") for r in scores
    ]
    groups = []
    for g in range(max(group_B, default=-1) + 1):
        rows = slice(g * group_size, (g + 1) * group_size)
        old = [len(s.tokens) if g in waited else 0 for s in samples[rows]]
        groups.append(
            rollout.OpenGroup(
                problem=f"problem {g}",
                source="",
                answer=None,
                group=sampler.Group(
                    [g + 1] * (g % 4 + 1), g, jax.random.key(0), 6, samples[rows]
                ),
                policy_steps=[np.zeros(len(s.tokens), np.int32) for s in samples[rows]],
                old_logp=[np.full(n, -1, np.float32) for n in old],
                outcomes=outcomes[rows],
                carried=True,
                waited=g in waited,
            )
        )
    penalty_B = np.zeros(B, np.float32) if penalty_B is None else np.float32(penalty_B)
    return rollout.Rollout(
        groups=groups,
        group_B=group_B,
        samples=samples,
        policy_steps=[np.zeros(n, np.int32) for n in lengths],
        old_logp=[old for open_ in groups for old in open_.old_logp],
        texts=[f"text {b}" for b in range(B)],
        outcomes=outcomes,
        penalty_B=penalty_B,
        reward_B=scores + penalty_B,
        correct_B=scores == 1,
    )


NAN = math.nan
MIXED = [
    *(1, -1, -1),
    *(-1, -1, -1),
    *(0.5, -1, 0.5),
    *(1, 1, 1),
    *(-1, 1, 1),
]


@pytest.mark.parametrize(
    "rewards, changes, want",
    [
        (MIXED, {}, [0, 1, 2, 6, 7, 8, 12, 13, 14]),
        (MIXED, {"filter": "accuracy"}, [0, 1, 2, 12, 13, 14]),
        (MIXED, {"filter": "none", "max_groups": 9}, list(range(15))),
        (MIXED, {"filter": "none"}, list(range(12))),
        (MIXED, {"max_groups": 2}, [0, 1, 2, 6, 7, 8]),
        # What failed is out before anything is compared: the first group is then equal,
        # the second has one sample, with nothing to compare it with.
        ([1, NAN, 1, NAN, 1, NAN, 1, NAN, -1], {}, [6, 8]),
        ([1, NAN, 1, NAN, 1, NAN, 1, NAN, -1], {"filter": "none"}, [0, 2, 6, 8]),
        ([NAN] * 6, {}, []),
        ([1, 1, 1], {}, []),
    ],
)
def test_select(rewards, changes, want):
    config = dataclasses.replace(CONFIG, **changes)
    chosen, surplus = batch.select(make(rewards), config)
    assert chosen.tolist() == want
    if not changes:
        assert surplus == []


def test_select_keeps_groups_of_one():
    config = dataclasses.replace(CONFIG, samples_per_prompt=1)
    chosen, _ = batch.select(make([1, NAN, -1], group_size=1), config)
    assert chosen.tolist() == [0, 2]


def test_surplus_waits_for_one_step():
    scores = [*(1, -1, -1), *(1, 1, 1), *(1, -1, 1), *(-1, -1, 1), *(1, 1, -1)]
    config = dataclasses.replace(CONFIG, max_groups=2)
    got = make(scores, waited=(0, 3))
    chosen, surplus = batch.select(got, config)
    assert chosen.tolist() == [6, 7, 8, 12, 13, 14]  # Fresh ones first.
    assert surplus == [0, 3]
    assert rollout.waiting(got, surplus, config) == {}
    config = dataclasses.replace(config, surplus="carry", max_groups=1)
    chosen, surplus = batch.select(got, config)
    assert (chosen.tolist(), surplus) == ([6, 7, 8], [4, 0, 3])
    waiting = rollout.waiting(got, surplus, config)
    assert waiting == {4: dataclasses.replace(got.groups[4], waited=True)}
    metrics = batch.sample_metrics(got, chosen, REWARDS, step=0)
    assert metrics["samples/generated"] == 9
    assert metrics["reward/correct"] == pytest.approx(7 / 9)


def test_rows_hold_prompt_response_and_padding():
    got = make([1, -1, -1, 1, 1, 1, 0, 0, 3])
    chosen = np.array([0, 1, 2, 7, 8])
    rows = batch.make_rows(got, chosen, CONFIG)
    T = 10
    advantages = [2 / 3, -1 / 3, -1 / 3]  # Before division by the standard deviation.
    advantages = [a / (math.sqrt(4 / 3) + 1e-6) * 2 for a in advantages]
    advantages += [s * 1.5 / (1.5 * math.sqrt(2) + 1e-6) for s in (-1, 1)]
    want = {name: np.zeros((5, T)) for name in rows}
    want["earlier_logp"][:] = math.nan  # All is still to be scored.
    for row, (b, advantage) in enumerate(zip(chosen, advantages, strict=True)):
        prompt, sample = got.group_of(b).group.prompt, got.samples[b]
        p, n = len(prompt), len(sample.tokens)
        want["tokens"][row, : p + n] = [*prompt, *sample.tokens]
        want["segment_ids"][row, : p + n] = 1
        want["mask"][row, p : p + n] = 1
        want["advantage"][row, p : p + n] = advantage
        want["behaviour_logp"][row, p : p + n] = sample.logprobs
        want["positions"][row] = range(T)
    for name, value in rows.items():
        float32 = name in ("advantage", "behaviour_logp", "earlier_logp")
        assert value.dtype == (np.float32 if float32 else np.int32), name
        if name == "advantage":
            np.testing.assert_allclose(value, want[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_rows_without_normalising_and_of_nothing():
    got = make([1, -1, -1])
    config = dataclasses.replace(CONFIG, normalize_std=False)
    rows = batch.make_rows(got, np.arange(3), config)
    np.testing.assert_allclose(rows["advantage"].max(1), [4 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(rows["advantage"].min(1), [0, -2 / 3, -2 / 3], rtol=1e-6)
    empty = batch.make_rows(got, np.zeros(0, int), config)
    assert {value.shape for value in empty.values()} == {(0, 10)}
    assert batch.mini_batch_rows(np.zeros(0, int), prompts=2) == []


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    prompts=st.integers(1, 5),
    aggregation=st.sampled_from(losses.AGGREGATIONS),
    data=st.data(),
)
def test_mini_batches(sizes, prompts, aggregation, data):
    groups_B = np.repeat(np.arange(len(sizes)) * 7, sizes)
    B, T = len(groups_B), 5
    length_B = np.array(data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    positive_B = np.array(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    rows = {
        "tokens": np.repeat(np.arange(B)[:, None], T, axis=1),
        "mask": (np.arange(T)[None] < length_B[:, None]).astype(np.int32),
        "advantage": np.ones((B, T), np.float32),
        "behaviour_logp": np.zeros((B, T), np.float32),
        "old_logp": -np.arange(B * T, dtype=np.float32).reshape(B, T),
    }
    minis = list(
        batch.mini_batches(
            rows,
            groups_B,
            positive_B,
            batch.mini_batch_rows(groups_B, prompts),
            aggregation=aggregation,
            norm_tokens=3,
        )
    )
    index = [mini["tokens"][:, 0] for mini in minis]
    assert np.concatenate(index).tolist() == list(range(B))
    counts = [len(set(groups_B[i])) for i in index]
    assert sum(counts) == len(sizes)  # No group is in two mini-batches.
    assert max(counts) <= prompts
    assert max(counts) - min(counts) <= 1
    assert len(minis) == -(-len(sizes) // prompts)
    for i, mini in zip(index, minis, strict=True):
        assert mini.keys() == {
            "tokens",
            "advantage",
            "old_logp",
            "weight",
            "positive_weight",
        }
        np.testing.assert_array_equal(mini["old_logp"], rows["old_logp"][i])
        for name, mask in (
            ("weight", rows["mask"][i]),
            ("positive_weight", rows["mask"][i] * positive_B[i, None]),
        ):
            want = np.zeros(mask.shape)
            trained = mask.sum(1)
            of_group = [trained[groups_B[i] == g].sum() for g in groups_B[i]]
            filled = len({g for g, n in zip(groups_B[i], trained, strict=True) if n})
            for row, n in enumerate(trained):
                share = {
                    "token_mean": 1 / max(trained.sum(), 1),
                    "seq_mean_token_sum": 1 / max((trained > 0).sum(), 1),
                    "seq_mean_token_mean": 1 / max((trained > 0).sum() * n, 1),
                    "seq_mean_token_sum_norm": 1 / 3,
                    "group_mean_token_mean": 1 / max(of_group[row] * filled, 1),
                }[aggregation]
                want[row, :n] = share
            np.testing.assert_allclose(mini[name], want, rtol=1e-6)


def test_sample_metrics():
    got = make([1, -1, NAN, 1, 1, 1, 0.5, -1, -1], lengths=[1, 2, 3, 4, 5, 6, 1, 1, 4])
    statuses = ["ok", "timeout", "error", *["ok"] * 4, "died", "died"]
    outcomes = [
        dataclasses.replace(outcome, status=status)
        for outcome, status in zip(got.outcomes, statuses, strict=True)
    ]
    got = dataclasses.replace(got, outcomes=outcomes)
    metrics = batch.sample_metrics(got, np.array([0, 1, 6, 7, 8]), REWARDS, step=0)
    assert metrics == pytest.approx(
        {
            "reward/mean": 1.5 / 8,
            "reward/mean_used": -1.5 / 5,
            "reward/correct": 4 / 8,
            "reward/any_correct": 2 / 3,
            "reward/groups_equal": 1 / 3,
            "reward/groups_with_0_correct": 1 / 3,
            "reward/groups_with_1_correct": 1 / 3,
            "reward/groups_with_2_correct": 0,
            "reward/groups_with_3_correct": 1 / 3,
            "reward_part/correct": 4 / 9,
            "reward_part/no_think_end": 0,
            "reward_part/wrong": 3 / 9,
            "reward_part/no_think_start": 0,
            "reward_part/other": 1 / 9,
            "reward_part/masked": 1 / 9,
            "reward/overlong_penalty": 0,
            "reward/timeouts": 1,
            "reward/deaths": 2,
            "reward/masked_errors": 1,
            "reward/masked_late": 0,
            "samples/generated": 9,
            "samples/used": 5,
            "samples/groups_used": 2,
            "samples/tokens": 27,
            "samples/tokens_carried": 0,
            "samples/length": 3,
            "samples/length_correct": 16 / 4,
            "samples/length_wrong": 11 / 5,
            "samples/length_p10": 1,
            "samples/length_p50": 3,
            "samples/length_p90": 5.2,
            "samples/length_max": 6,
            "samples/truncated": 4 / 9,
        }
    )
    failed = batch.sample_metrics(make([NAN] * 3), np.zeros(0, int), REWARDS, step=0)
    assert math.isnan(failed["reward/mean"])
    assert failed["samples/groups_used"] == 0


def test_sample_rows_are_json():
    got = make([1, -1, NAN, 1, 1, 1])
    chosen, _ = batch.select(got, CONFIG)
    assert chosen.tolist() == [0, 1]
    rows = batch.make_rows(got, chosen, CONFIG)
    learnt = {"old_logp": rows["mask"] * -1.5, "log_ratio": rows["tokens"] / 3e3}
    rows |= learnt
    written = batch.sample_rows(got, chosen, rows, waiting={}, token_groups=1)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written[1] == {
        "prompt_id": 0,
        "prompt": "problem 0",
        "source": "",
        "response": "text 1",
        "reward": -1.0,
        "reward_status": "ok",
        "reward_detail": "",
        "advantage": pytest.approx(-1 / math.sqrt(2), rel=1e-5),
        "group": 0,
        "finished": False,
        "num_tokens": 2,
        "policy_steps": [0],
        "logprob": -2.125,
        "tokens": [200, 201],
        "old_logp": [-1.5, -1.5],
        "log_ratio": [0.0667, 0.067],
    }
    assert written[0]["advantage"] == -written[1]["advantage"]
    assert [row["advantage"] for row in written[2:]] == [None] * 4
    assert [row["reward"] for row in written] == [1, -1, None, 1, 1, 1]
    assert written[2]["reward_status"] == "error"
    assert [row["group"] for row in written] == [0, 0, 0, 1, 1, 1]
    none = batch.make_rows(got, chosen[:0], CONFIG)
    nothing = batch.sample_rows(got, chosen[:0], none, waiting={}, token_groups=1)
    assert {row["advantage"] for row in nothing} == {None}
    later = batch.sample_rows(
        got, chosen, rows, waiting={1: got.groups[1]}, token_groups=1
    )
    assert later == written[:3]


def test_so_many_groups_are_written_token_by_token():
    got = make([1, -1, 1] * 4)
    chosen = np.array([6, 7, 8, 3, 4, 9, 10, 11])  # Of groups 2, 1 and 3.
    rows = batch.make_rows(got, chosen, CONFIG)
    rows["old_logp"], rows["log_ratio"] = rows["mask"] * -1.5, rows["mask"] * np.nan
    for count, want in (
        (0, set()),
        (1, {6, 7, 8}),
        (2, {6, 7, 8, 9, 10, 11}),
        (9, set(chosen.tolist())),
    ):
        written = batch.sample_rows(got, chosen, rows, {}, token_groups=count)
        assert {b for b, row in enumerate(written) if "tokens" in row} == want
        for b in want:
            assert written[b]["tokens"] == got.samples[b].tokens
            assert written[b]["log_ratio"] == [None] * len(got.samples[b].tokens)


def test_parts_of_the_reward_go_by_the_tags():
    """A quarter of the tests passed is worth as much as thinking that did not end."""
    options = {"correct": 1, "wrong": -1, "no_think_end": -0.5, "no_think_start": -2}
    kinds = {"math": routing.Kind("math", options)}
    rewards = dataclasses.replace(REWARDS, kinds=kinds)
    got = make([-0.5, -0.5, -2, -1, 1, NAN])
    texts = ["<think>", "<think></think>", "</think>", "", "<think></think>", ""]
    got = dataclasses.replace(got, texts=texts)
    metrics = batch.sample_metrics(got, np.zeros(0, int), rewards, step=0)
    for name in ("correct", "wrong", "no_think_end", "no_think_start", "other"):
        assert metrics[f"reward_part/{name}"] == pytest.approx(1 / 6), name
    assert metrics["reward_part/masked"] == pytest.approx(1 / 6)


OVERLONG = [(5, 4, 0.0), (16, 4, 0.0), (17, 4, -0.25), (20, 4, -1.0), (20, 0, 0.0)]


@pytest.mark.parametrize("length, buffer, want", OVERLONG)
def test_the_reward_falls_before_the_limit(length, buffer, want):
    sample = sampler.Sample([7] * length, np.zeros(length, np.float32), True)
    open_ = make([1, -1, -1]).groups[0]
    open_ = dataclasses.replace(
        open_, group=dataclasses.replace(open_.group, samples=[sample] * 3, limit=20)
    )
    tokenizer = type("Tokenizer", (), {"decode": lambda self, ids: ""})()
    got = rollout.flatten(
        [open_], tokenizer, 1.0, overlong_tokens=buffer, overlong_penalty=1.0
    )
    assert got.penalty_B.tolist() == [want] * 3
    assert got.reward_B.tolist() == [1 + want, -1 + want, -1 + want]
    assert got.correct_B.tolist() == [True, False, False]  # Before the penalty.


def _golden_filters():
    cases = json.loads((GOLDEN / "filter_groups.json").read_text())
    return [pytest.param(case, id=str(case["case"])) for case in cases]


@pytest.mark.parametrize("case", _golden_filters())
def test_filters_are_those_of_the_authors(case):
    """By design, ours differ in two ways: whole groups are cut, where theirs may cut one in
    the middle when unfinished samples were dropped; and what is left of a short batch is
    trained on whole, where theirs is rounded down to the number of their processes."""
    theirs = case["config"]
    kept = []
    for number, round_ in enumerate(case["rounds"]):
        scores = np.where(np.array(round_["acc"]) == 1, 1.0, -1.0)
        on = theirs["filter_groups_enable"]
        config = dataclasses.replace(
            CONFIG,
            samples_per_prompt=theirs["n"],
            max_groups=10**6,
            filter="accuracy" if on and theirs["adv"] else "none",
            max_accuracy=(theirs["avg"] if on else None) or 1.0,
            drop_unfinished=round_["is_finish"] is not None,
        )
        got = make(scores, group_size=theirs["n"], finished=round_["is_finish"])
        chosen, _ = batch.select(got, config)
        kept += [round_["ids"][b] for b in chosen]
        want = round_["ids_after"]
        last = number == len(case["rounds"]) - 1
        if not last or not on:
            assert kept == want
    full = theirs["train_batch_size"] * theirs["n"]
    if on and len(kept) > full:
        assert kept[:full] == want
    elif on:
        assert kept[: len(want)] == want
        assert len(kept) - len(want) < theirs["world_size"]
    groups = advantages.groups(np.array(kept) // theirs["n"])
    assert all(len(rows) <= theirs["n"] for rows in groups)


def test_a_reward_that_always_fails_stops_the_run():
    got = make([NAN] * 3)
    outcomes = [Outcome(NAN, "error", "KeyError: 'x'"), *got.outcomes[1:]]
    rollout.check_rewards(make([NAN, NAN, 1]))
    with pytest.raises(InputError, match=r"failed on all 3 samples .* KeyError: 'x'"):
        rollout.check_rewards(dataclasses.replace(got, outcomes=outcomes))
    late = [
        Outcome(NAN, "late", "")
    ] * 3  # The step's deadline: not the function's fault.
    rollout.check_rewards(dataclasses.replace(got, outcomes=late))


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    prompts=st.integers(1, 3),
    data=st.data(),
)
def test_log_ratios_find_back_to_their_tokens(sizes, prompts, data):
    groups_B = np.repeat(np.arange(len(sizes)), sizes)
    B, T = len(groups_B), 7
    lengths = np.array(data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    segment_ids_BT = (np.arange(T) < lengths[:, None]).astype(np.int32)
    want_BT = np.arange(1, B * T + 1, dtype=np.float32).reshape(B, T) * segment_ids_BT
    parts = batch.mini_batch_rows(groups_B, prompts)
    updates = []
    for index in parts:
        rows = {"segment_ids": segment_ids_BT[index], "x": want_BT[index]}
        packed, _ = batch.pack(rows)
        room = np.zeros((B + 3 - len(packed["x"]), T), np.float32)  # Empty rows.
        updates.append(np.concatenate([packed["x"], room])[None])
    got_BT = batch.log_ratios(segment_ids_BT, parts, updates)
    np.testing.assert_array_equal(got_BT, want_BT)


@hypothesis.given(st.lists(st.integers(0, 12), max_size=40))
def test_packed_rows_hold_every_sample_once(lengths):
    T, rng = 12, np.random.default_rng(0)
    real_BT = np.arange(T) < np.array(lengths, int)[:, None]
    rows = {
        "tokens": rng.integers(1, 99, real_BT.shape) * real_BT,
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), real_BT.shape),
        "segment_ids": real_BT.astype(np.int32),
        "weight": rng.random(real_BT.shape).astype(np.float32) * real_BT,
    }
    packed, places = batch.pack(rows)
    for name, x_BT in rows.items():
        want = real_BT if name == "segment_ids" else x_BT * real_BT
        back = batch.unpack(packed[name], places)
        np.testing.assert_array_equal(
            back != 0 if name == "segment_ids" else back, want
        )
        assert packed[name].dtype == x_BT.dtype
    for segment_T, position_T in zip(
        packed["segment_ids"], packed["positions"], strict=True
    ):
        ids, counts = np.unique(segment_T[segment_T != 0], return_counts=True)
        np.testing.assert_array_equal(ids, np.arange(1, len(ids) + 1))
        for segment, count in zip(ids, counts, strict=True):
            np.testing.assert_array_equal(
                position_T[segment_T == segment], np.arange(count)
            )
    # First fit: no row's samples would all have had room in an earlier one.
    used = np.count_nonzero(packed["segment_ids"], axis=1)
    assert used.sum() == sum(lengths)
    assert np.count_nonzero(used * 2 <= T) <= 1
