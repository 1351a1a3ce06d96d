"""From samples to rows: what is collected, chosen, laid out, weighed and written down."""

import dataclasses
import json
import math
from concurrent import futures

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from klear_jax import losses, qwen3, rollout, sampler
from klear_jax.errors import InputError
from klear_jax.rewards.pool import Outcome
from klear_jax.sampling import Sampling

CONFIG = rollout.RolloutConfig(
    prompts=4,
    max_groups=4,
    samples_per_prompt=3,
    max_prompt_tokens=4,
    max_new_tokens=6,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    finish_fraction=1.0,
    stop_strings=(),
    filter="reward",
    normalize_std=True,
)
REWARDS = rollout.RewardConfig(
    kind="math",
    options={"wrong": -1.0},
    full_credit=1.0,
    num_workers=1,
    task_timeout_s=1.0,
    memory_mb=1,
)


class Tokenizer:
    stop_ids = (1, 2)

    def decode(self, ids):
        return " ".join(map(str, ids))


class Pool:
    """Scores at once, by a function of response and answer, and keeps what it was given."""

    def __init__(self, outcome):
        self.tasks, self.outcome = [], outcome

    def submit(self, kind, response, ground_truth, **options):
        self.tasks.append((kind, response, ground_truth, options))
        future = futures.Future()
        future.set_result(self.outcome(response, ground_truth))
        return future


MODEL = qwen3.Config(
    vocab_size=16,
    width=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=8,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=32,
)
PROMPTS = {
    "tokens": [[3, 4], [5], [6, 7, 8]],
    "prompt_ids": [30, 10, 20],
    "answers": [1, 2, 3],
    "problems": ["a", "b", "c"],
}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda param: rng.normal(size=param.shape).astype(np.float32),
        qwen3.param_table(MODEL),
    )


def score_length(response, answer):
    return Outcome(100.0 * answer + len(response.split()), "ok", "")


def collect(params, groups, pool=None, **other):
    arguments = {
        "sampling": Sampling(),
        "engine": sampler.Engine(num_slots=4, decode_steps=1),
        "slot_tokens": 16,
        "stop_strings": (),
    }
    return rollout.collect(
        params,
        MODEL,
        groups,
        Tokenizer(),
        pool or Pool(score_length),
        REWARDS,
        **arguments | other,
    )


def open_groups(num_samples=2, max_new_tokens=6):
    return rollout.open_groups(
        PROMPTS, num_samples=num_samples, max_new_tokens=max_new_tokens, key=KEY
    )


def test_collect_scores_every_sample_against_its_own_answer(params):
    pool = Pool(score_length)
    got, going_on, counts = collect(params, open_groups(), pool, step=3)
    assert going_on == []
    assert counts["slot_steps"] >= sum(len(s.tokens) for s in got.samples)
    want = sampler.generate(
        params,
        MODEL,
        PROMPTS["tokens"],
        num_samples=2,
        stop_ids=(1, 2),
        seed=KEY,
        prompt_ids=[30, 10, 20],
        max_new_tokens=6,
    )
    assert [s.tokens for s in got.samples] == [s.tokens for g in want for s in g]
    assert got.texts == [" ".join(map(str, s.tokens)) for s in got.samples]
    assert len({len(s.tokens) for s in got.samples}) > 1
    assert got.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert got.problems == ["a", "a", "b", "b", "c", "c"]
    assert got.prompts == [[3, 4]] * 2 + [[5]] * 2 + [[6, 7, 8]] * 2
    lengths = [len(s.tokens) for s in got.samples]
    rewards = [100 * (g + 1) + n for g, n in zip(got.group_B, lengths, strict=True)]
    assert got.reward_B.dtype == np.float32
    assert got.reward_B.tolist() == rewards
    assert [o.score for o in got.outcomes] == rewards
    assert len(got) == len(pool.tasks) == 6
    assert {(kind, *options.items()) for kind, _, _, options in pool.tasks} == {
        ("math", ("wrong", -1.0))
    }
    assert [s.tolist() for s in got.policy_steps] == [[3] * n for n in lengths]
    assert {len(old) for old in got.old_logp} == {0}


def test_a_group_that_goes_on_keeps_what_each_policy_drew(params):
    """Cut off after the first group, saved, resumed under other parameters: the tokens of
    the first step stay as they were, and are never scored again."""
    whole, _, _ = collect(params, open_groups(max_new_tokens=12), step=0)
    pool = Pool(score_length)
    first, going_on, _ = collect(
        params,
        open_groups(max_new_tokens=12),
        pool,
        step=0,
        finish_fraction=0.3,
        engine=sampler.Engine(num_slots=5, decode_steps=1),
    )
    num = len(first) // 2
    assert 0 < num < 3
    assert len(going_on) == 3 - num
    begun = [s for open_ in going_on for s in open_.group.samples]
    assert {bool(s.tokens) for s in begun} == {True, False}  # One had no slot.
    ended = [o for open_ in going_on for o in open_.outcomes if o is not None]
    assert len(pool.tasks) == len(first) + len(ended)

    def score(rows):
        new = np.float32(-7) * rows["mask"]
        return np.where(np.isnan(rows["earlier_logp"]), new, rows["earlier_logp"])

    going_on = rollout.score_open(going_on, score, 16)
    text = json.dumps(rollout.to_json(going_on))
    going_on = rollout.from_json(json.loads(text))
    assert json.dumps(rollout.to_json(going_on)) == text

    other = jax.tree.map(lambda x: -x, params)
    new = rollout.open_groups(
        PROMPTS, num_samples=2, max_new_tokens=12, key=jax.random.key(6)
    )
    # It waits for what is carried, however small the share that it must finish.
    second, _, _ = collect(other, going_on + new, pool, step=1, finish_fraction=0.01)
    assert len(pool.tasks) >= 6
    found = {(p, j): b for b, p in enumerate(second.problems) for j in (b % 2,)}
    kept = 0
    for open_ in going_on:
        for j, before in enumerate(open_.group.samples):
            b = found[open_.problem, j]
            n = len(before.tokens)
            sample = second.samples[b]
            assert sample.tokens[:n] == before.tokens
            np.testing.assert_array_equal(sample.logprobs[:n], before.logprobs)
            assert second.policy_steps[b].tolist() == [0] * n + [1] * (
                len(sample.tokens) - n
            )
            assert second.old_logp[b].tolist() == [-7.0] * n
            kept += n
            at = whole.problems.index(open_.problem) + j
            assert whole.samples[at].tokens[:n] == before.tokens
    assert kept
    metrics = rollout.sample_metrics(second, np.zeros(0, int), 1.0, step=1)
    assert metrics["samples/tokens_carried"] == kept
    config = dataclasses.replace(CONFIG, max_prompt_tokens=4, max_new_tokens=12)
    rows = rollout.make_rows(second, np.arange(len(second)), config)
    assert (rows["earlier_logp"] == -7).sum() == kept
    assert np.isnan(rows["earlier_logp"]).sum() == rows["tokens"].size - kept


def test_a_stop_string_ends_a_sample_with_the_token_that_completes_it():
    logprobs = -np.arange(4, dtype=np.float32)
    sample = sampler.Sample([5, 9, 7, 9], logprobs, finished=False)
    got = rollout.cut(sample, Tokenizer(), ("8", "9 7"))
    assert (got.tokens, got.finished) == ([5, 9, 7], True)
    assert got.logprobs.tolist() == [0, -1, -2]
    assert rollout.cut(sample, Tokenizer(), ("7 7",)) is sample
    assert rollout.cut(sample, Tokenizer(), ()) is sample


def make(rewards, group_size=3, lengths=None):
    """A rollout of those rewards; sample b has prompt [g + 1] * (g % 4 + 1)."""
    rewards = np.float32(rewards)
    B = len(rewards)
    group_B = np.arange(B) // group_size
    lengths = lengths or [b % 6 + 1 for b in range(B)]
    samples = [
        sampler.Sample(
            tokens=[100 * (b + 1) + t for t in range(n)],
            logprobs=-np.float32([b + t / 8 for t in range(n)]),
            finished=b % 2 == 0,
        )
        for b, n in enumerate(lengths)
    ]
    return rollout.Rollout(
        problems=[f"problem {g}" for g in group_B],
        prompts=[[int(g) + 1] * (int(g) % 4 + 1) for g in group_B],
        samples=samples,
        policy_steps=[np.zeros(n, np.int32) for n in lengths],
        old_logp=[np.zeros(0, np.float32)] * B,
        texts=[f"text {b}" for b in range(B)],
        outcomes=[
            Outcome(float(r), "ok" if np.isfinite(r) else "error", "") for r in rewards
        ],
        reward_B=rewards,
        group_B=group_B,
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
    got = rollout.select(make(rewards), config, 1.0)
    assert got.tolist() == want


def test_select_keeps_groups_of_one():
    config = dataclasses.replace(CONFIG, samples_per_prompt=1)
    got = rollout.select(make([1, NAN, -1], group_size=1), config, 1.0)
    assert got.tolist() == [0, 2]


def test_rows_hold_prompt_response_and_padding():
    got = make([1, -1, -1, 1, 1, 1, 0, 0, 3])
    chosen = np.array([0, 1, 2, 7, 8])
    rows = rollout.make_rows(got, chosen, CONFIG)
    T = 10
    advantages = [2 / 3, -1 / 3, -1 / 3]  # Before division by the standard deviation.
    advantages = [a / (math.sqrt(4 / 3) + 1e-6) * 2 for a in advantages]
    advantages += [s * 1.5 / (1.5 * math.sqrt(2) + 1e-6) for s in (-1, 1)]
    want = {name: np.zeros((5, T)) for name in rows}
    want["earlier_logp"][:] = math.nan  # All is still to be scored.
    for row, (b, advantage) in enumerate(zip(chosen, advantages, strict=True)):
        prompt, sample = got.prompts[b], got.samples[b]
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
    rows = rollout.make_rows(got, np.arange(3), config)
    np.testing.assert_allclose(rows["advantage"].max(1), [4 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(rows["advantage"].min(1), [0, -2 / 3, -2 / 3], rtol=1e-6)
    empty = rollout.make_rows(got, np.zeros(0, int), config)
    assert {value.shape for value in empty.values()} == {(0, 10)}
    nothing = rollout.mini_batches(
        empty, np.zeros(0, int), np.zeros(0, bool), prompts=2, aggregation="token_mean"
    )
    assert list(nothing) == []


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
        rollout.mini_batches(
            rows, groups_B, positive_B, prompts=prompts, aggregation=aggregation
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
            for row, n in enumerate(trained):
                share = {
                    "token_mean": 1 / max(trained.sum(), 1),
                    "seq_mean_token_sum": 1 / max((trained > 0).sum(), 1),
                    "seq_mean_token_mean": 1 / max((trained > 0).sum() * n, 1),
                    "seq_mean_token_sum_norm": 1 / T,
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
    metrics = rollout.sample_metrics(got, np.array([0, 1, 6, 7, 8]), 1.0, step=0)
    assert metrics == pytest.approx(
        {
            "reward/mean": 1.5 / 8,
            "reward/correct": 4 / 9,
            "reward/any_correct": 2 / 3,
            "reward/groups_all_correct": 1 / 3,
            "reward/timeouts": 1,
            "reward/deaths": 2,
            "reward/masked_errors": 1,
            "samples/generated": 9,
            "samples/used": 5,
            "samples/groups_used": 2,
            "samples/tokens": 27,
            "samples/tokens_carried": 0,
            "samples/length": 3,
            "samples/length_max": 6,
            "samples/finished": 5 / 9,
        }
    )
    failed = rollout.sample_metrics(make([NAN] * 3), np.zeros(0, int), 1.0, step=0)
    assert math.isnan(failed["reward/mean"])
    assert failed["samples/groups_used"] == 0


def test_sample_rows_are_json():
    got = make([1, -1, NAN, 1, 1, 1])
    chosen = rollout.select(got, CONFIG, 1.0)
    assert chosen.tolist() == [0, 1]
    rows = rollout.make_rows(got, chosen, CONFIG)
    written = rollout.sample_rows(got, chosen, rows)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written[1] == {
        "prompt": "problem 0",
        "response": "text 1",
        "reward": -1.0,
        "reward_status": "ok",
        "advantage": pytest.approx(-1 / math.sqrt(2), rel=1e-5),
        "group": 0,
        "finished": False,
        "num_tokens": 2,
        "policy_steps": [0],
        "logprob": -2.125,
    }
    assert written[0]["advantage"] == -written[1]["advantage"]
    assert [row["advantage"] for row in written[2:]] == [None] * 4
    assert [row["reward"] for row in written] == [1, -1, None, 1, 1, 1]
    assert written[2]["reward_status"] == "error"
    assert [row["group"] for row in written] == [0, 0, 0, 1, 1, 1]
    nothing = rollout.sample_rows(
        got, chosen[:0], rollout.make_rows(got, chosen[:0], CONFIG)
    )
    assert {row["advantage"] for row in nothing} == {None}


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("prompts", 0, "0"),
        ("max_groups", 0, "0"),
        ("samples_per_prompt", -1, "-1"),
        ("max_prompt_tokens", 0, "0"),
        ("max_new_tokens", 0, "0"),
        ("filter", "rewards", "'rewards'"),
        ("stop_strings", ("x", ""), "an empty string"),
        ("temperature", -1.0, "-1.0"),
        ("top_p", 0.0, "0.0"),
        ("top_k", -2, "-2"),
        ("finish_fraction", 0.0, "0.0"),
        ("finish_fraction", 1.5, "1.5"),
    ],
)
def test_bad_settings_are_named(name, value, named):
    with pytest.raises(InputError, match=rf"{name} .*{named}$"):
        dataclasses.replace(CONFIG, **{name: value})
