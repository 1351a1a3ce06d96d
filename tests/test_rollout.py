"""From samples to rows: what is collected, chosen, laid out, weighed and written down."""

import dataclasses
import json
from concurrent import futures

import jax
import numpy as np
import pytest

from klear_jax import batch, qwen3, rollout, sampler
from klear_jax.errors import InputError
from klear_jax.rewards import routing
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
    max_batches=1,
    surplus="discard",
    filter="reward",
    max_accuracy=1.0,
    normalize_std=True,
    drop_unfinished=False,
    overlong_tokens=0,
    overlong_penalty=1.0,
    token_groups=0,
)
REWARDS = routing.RewardConfig(
    kinds={"math": routing.Kind("math", {"wrong": -1.0, "correct": 1.0})},
    sources={},
    kind="math",
    full_credit=1.0,
    num_workers=1,
    task_timeout_s=1.0,
    step_timeout_s=0.2,
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
    "sources": ["", "", ""],
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
        "tell": lambda text: None,
    }
    complete, going_on, counts = rollout.collect(
        params,
        MODEL,
        groups,
        Tokenizer(),
        pool or Pool(score_length),
        REWARDS,
        **arguments | other,
    )
    return rollout.flatten(complete, Tokenizer(), 1.0), going_on, counts


def open_groups(num_samples=2, max_new_tokens=6, key=KEY):
    return rollout.open_groups(
        PROMPTS,
        REWARDS,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        key=key,
        seed="0/0",
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
    assert [open_.problem for open_ in got.groups] == ["a", "b", "c"]
    assert [open_.group.prompt for open_ in got.groups] == PROMPTS["tokens"]
    lengths = [len(s.tokens) for s in got.samples]
    rewards = [100 * (g + 1) + n for g, n in zip(got.group_B, lengths, strict=True)]
    assert got.reward_B.dtype == np.float32
    assert got.reward_B.tolist() == rewards
    assert [o.score for o in got.outcomes] == rewards
    assert len(got) == len(pool.tasks) == 6
    assert {(kind, *options.items()) for kind, _, _, options in pool.tasks} == {
        ("math", ("wrong", -1.0), ("correct", 1.0))
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

    going_on = batch.score_open(going_on, score, 16)
    text = json.dumps(rollout.to_json(going_on))
    going_on = rollout.from_json(json.loads(text))
    assert json.dumps(rollout.to_json(going_on)) == text

    other = jax.tree.map(lambda x: -x, params)
    new = open_groups(max_new_tokens=12, key=jax.random.key(6))
    # It waits for what is carried, however small the share that it must finish.
    second, _, _ = collect(other, going_on + new, pool, step=1, finish_fraction=0.01)
    assert len(pool.tasks) >= 6
    found = {(second.group_of(b).problem, b % 2): b for b in range(len(second))}
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
            at = 2 * [x.problem for x in whole.groups].index(open_.problem) + j
            assert whole.samples[at].tokens[:n] == before.tokens
    assert kept
    metrics = batch.sample_metrics(second, np.zeros(0, int), REWARDS, step=1)
    assert metrics["samples/tokens_carried"] == kept
    config = dataclasses.replace(CONFIG, max_prompt_tokens=4, max_new_tokens=12)
    rows = batch.make_rows(second, np.arange(len(second)), config)
    assert (rows["earlier_logp"] == -7).sum() == kept
    assert np.isnan(rows["earlier_logp"]).sum() == rows["tokens"].size - kept


def test_what_is_scored_too_late_is_masked(params):
    class Slow(Pool):
        def submit(self, kind, response, ground_truth, **options):
            if len(self.tasks) == 3:
                self.tasks.append("one that never ends")
                return futures.Future()
            return super().submit(kind, response, ground_truth, **options)

    got, going_on, _ = collect(params, open_groups(), Slow(score_length))
    assert not going_on
    assert sorted(o.status for o in got.outcomes) == ["late", *["ok"] * 5]
    assert np.isnan(got.reward_B).sum() == 1


def test_a_stop_string_ends_a_sample_with_the_token_that_completes_it():
    logprobs = -np.arange(4, dtype=np.float32)
    sample = sampler.Sample([5, 9, 7, 9], logprobs, finished=False)
    got = rollout.cut(sample, Tokenizer(), ("8", "9 7"))
    assert (got.tokens, got.finished) == ([5, 9, 7], True)
    assert got.logprobs.tolist() == [0, -1, -2]
    assert rollout.cut(sample, Tokenizer(), ("7 7",)) is sample
    assert rollout.cut(sample, Tokenizer(), ()) is sample


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("prompts", 0, "0"),
        ("max_groups", 0, "0"),
        ("samples_per_prompt", -1, "-1"),
        ("max_prompt_tokens", 0, "0"),
        ("max_new_tokens", 0, "0"),
        ("max_batches", 0, "0"),
        ("surplus", "keep", "'keep'"),
        ("max_accuracy", 0.0, "0.0"),
        ("overlong_tokens", 7, "7"),
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
