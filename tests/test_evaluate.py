"""avg@n, pass@k and their intervals, on samples whose answers are known."""

import dataclasses
import itertools
import json
import sys
from concurrent import futures

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from klear_jax import evaluate, sampler
from klear_jax.data import cleaning, prepare
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Outcome
from klear_jax.sampling import Sampling

CONFIG = evaluate.EvaluationConfig(
    data="",
    split="test",
    num_problems=0,
    num_samples=4,
    temperature=0.6,
    top_p=0.95,
    top_k=20,
    repetition_penalty=1.05,
    greedy=True,
    max_prompt_tokens=4,
    max_new_tokens=8,
    stop_strings=(),
    seed=3,
    every=5,
    kinds={},
)
REWARDS = routing.RewardConfig(
    kinds={"math": routing.Kind("math", {})},
    sources={},
    kind="math",
    full_credit=1.0,
    num_workers=1,
    task_timeout_s=1.0,
    step_timeout_s=1.0,
    memory_mb=1,
)
# Three problems, four samples and a greedy one each; the length of a sample is its number
# of tokens, and a token 1 makes it right.
SAMPLED = [
    [[1], [0, 1], [1, 0], [0]],
    [[0], [0, 0, 0], [0], [0]],
    [[1], [1], [1], [0, 1]],
]
ALL_SAMPLED = SAMPLED
GREEDY = [[[1]], [[0, 1]], [[0]]]
PROBLEMS = {
    "tokens": [[5], [6], [7]],
    "prompt_ids": [0, 1, 2],
    "answers": ["a", "b", "c"],
    "problems": ["x", "y", "z"],
    "messages": [[{"role": "user", "content": c}] for c in "xyz"],
    "sources": ["", "", ""],
}


class Tokenizer:
    stop_ids = (1,)

    def decode(self, ids):
        return " ".join(map(str, ids))


class Pool:
    """Right with a 1; the response that the test says cannot be scored is an error."""

    def __init__(self, unscored=None):
        self.unscored = unscored

    def submit(self, kind, response, ground_truth):
        outcome = Outcome(1.0 if "1" in response else -1.0, "ok", "")
        if response == self.unscored:
            outcome = Outcome(float("nan"), "error", "")
        future = futures.Future()
        future.set_result(outcome)
        return future


@pytest.fixture
def calls(monkeypatch):
    """What the sampler was asked; its answers are SAMPLED or GREEDY."""
    calls = []

    def sample_groups(params, model, groups, *, on_finish, **arguments):
        calls.append({"groups": groups} | arguments)
        answers = GREEDY if arguments["sampling"].temperature == 0 else SAMPLED
        for i, group in enumerate(groups):
            for j in range(len(group.samples)):
                tokens = answers[i][j]
                logprobs = np.zeros(len(tokens), np.float32)
                on_finish(i, j, sampler.Sample(tokens, logprobs, tokens[-1] == 1))
        return groups, {}

    monkeypatch.setattr(sampler, "sample_groups", sample_groups)
    return calls


def run(config, pool=None, problems=PROBLEMS):
    return evaluate.evaluate(
        {},
        None,
        problems,
        Tokenizer(),
        pool or Pool(),
        REWARDS,
        config,
        engine=sampler.Engine(num_slots=2),
        dtype=jnp.dtype("float32"),
    )


def test_known_answers_give_known_numbers(calls):
    metrics, rollouts = run(CONFIG)
    bounds = {name for name in metrics if name.endswith(("_low", "_high"))}
    assert {name: value for name, value in metrics.items() if name not in bounds} == {
        "problems": 3,
        "avg@4": pytest.approx((3 / 4 + 0 + 1) / 3),
        "accuracy": pytest.approx((3 / 4 + 0 + 1) / 3),
        "pass@1": pytest.approx((3 / 4 + 0 + 1) / 3),
        "pass@2": pytest.approx(2 / 3),  # Two of four cannot both be the wrong one.
        "pass@4": pytest.approx(2 / 3),
        "length": 17 / 12,
        "finished": 6 / 12,
        "greedy": pytest.approx(2 / 3),
        "scoring_errors": 0,
    }
    assert bounds == {"avg@4_low", "avg@4_high", "greedy_low", "greedy_high"}
    assert metrics["avg@4_low"] < metrics["avg@4"] < metrics["avg@4_high"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert [len(one) for one in rollouts] == [12, 3]
    sampled, greedy = calls
    assert sampled["sampling"] == Sampling(0.6, 0.95, 20, 1.05)
    assert greedy["sampling"] == Sampling(0.0, 0.95, 20, 1.05)
    for call, num_samples in ((sampled, 4), (greedy, 1)):
        assert call["engine"] == sampler.Engine(num_slots=2)
        assert call["slot_tokens"] == 4 + 8
        assert call["stop_ids"] == (1,)
        assert [group.prompt_id for group in call["groups"]] == [0, 1, 2]
        assert {group.limit for group in call["groups"]} == {8}
        assert {len(group.samples) for group in call["groups"]} == {num_samples}


def test_greedy_alone_and_samples_alone(calls):
    greedy, _ = run(dataclasses.replace(CONFIG, num_samples=0))
    assert greedy.keys() == {
        "problems",
        "greedy",
        "greedy_low",
        "greedy_high",
        "accuracy",
        "scoring_errors",
    }
    assert greedy["accuracy"] == greedy["greedy"] == pytest.approx(2 / 3)
    three, _ = run(dataclasses.replace(CONFIG, num_samples=3, greedy=False))
    assert [name for name in three if "pass" in name] == ["pass@1", "pass@2", "pass@3"]
    assert three["avg@3"] == pytest.approx(2 / 3)
    assert "greedy" not in three
    assert len(calls) == 2


def test_what_could_not_be_scored_is_counted_and_not_right(calls):
    metrics, _ = run(CONFIG, Pool(unscored="0 1"))
    assert metrics["scoring_errors"] == 3  # Two samples, a greedy one.
    assert metrics["avg@4"] == pytest.approx((2 + 0 + 3) / 12)
    assert metrics["greedy"] == pytest.approx(1 / 3)


def test_per_problem(calls):
    _, rollouts = run(CONFIG)
    assert evaluate.per_problem(PROBLEMS, rollouts) == [
        {"prompt_id": 0, "problem": "x", "correct": [0.75, 1.0]},
        {"prompt_id": 1, "problem": "y", "correct": [0.0, 1.0]},
        {"prompt_id": 2, "problem": "z", "correct": [1.0, 0.0]},
    ]


def test_samples_are_written_once_and_make_pass_rates(calls, monkeypatch, tmp_path):
    """Also where the command was killed in the middle of a line."""
    monkeypatch.setattr(evaluate, "SAMPLED_AT_ONCE", 1)
    config = dataclasses.replace(CONFIG, greedy=False)
    asked = []

    def one_problem(problems):
        [name] = problems["prompt_ids"]
        asked.append(name)
        monkeypatch.setattr(sys.modules[__name__], "SAMPLED", [ALL_SAMPLED[name]])
        return run(config, problems=problems)

    path = tmp_path / "samples.jsonl"
    evaluate.write_samples(path, PROBLEMS, config, "m", one_problem)
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["correct"] for row in rows] == [
        1 in tokens for samples in ALL_SAMPLED for tokens in samples
    ]
    assert rows[1] == {
        "prompt_id": 0,
        "prompt": [{"role": "user", "content": "x"}],
        "response": "0 1",
        "answer": "a",
        "data_source": "",
        "reward": 1.0,
        "correct": True,
        "finished": True,
        "made_with": "m",
    }
    rates = prepare.read_pass_rates((str(path),))
    hashes = map(cleaning.prompt_hash, PROBLEMS["messages"])
    assert [rates[one] for one in hashes] == [0.75, 0.0, 1.0]
    for keep, want in ((0.99, [2]), (0.66, [1, 2]), (0.2, [0, 1, 2]), (1, [])):
        path.write_text(whole[: int(len(whole) * keep)])
        asked.clear()
        evaluate.write_samples(path, PROBLEMS, config, "m", one_problem)
        assert path.read_text() == whole
        assert asked == want
    with pytest.raises(InputError, match=r"line 1 is not of this model, data and eval"):
        evaluate.write_samples(path, PROBLEMS, config, "another", one_problem)
    assert path.read_text() == whole
    # What could not be scored does not count.
    rows[1]["reward"], rows[1]["correct"] = None, False
    path.write_text("\n".join(map(json.dumps, rows)))
    rates = prepare.read_pass_rates((str(path),))
    assert rates[cleaning.prompt_hash(PROBLEMS["messages"][0])] == 2 / 3
    with pytest.raises(InputError, match=r"needs evaluation.num_samples above 0 and"):
        evaluate.write_samples(path, PROBLEMS, CONFIG, "m", one_problem)


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
    got = evaluate.pass_at_k(np.array(rows), k)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_interval_is_95_percent_of_a_normal_and_shrinks():
    rng = np.random.default_rng(0)
    widths = []
    for num in (100, 1600):
        values = rng.integers(0, 9, num) / 8
        got = evaluate.interval("x", values)
        assert list(got) == ["x", "x_low", "x_high"]
        assert got["x_low"] < got["x"] < got["x_high"]
        assert got["x"] == values.mean()
        half = 1.96 * values.std() / np.sqrt(num)
        assert got["x_low"] == pytest.approx(got["x"] - half, abs=0.1 * half)
        assert got["x_high"] == pytest.approx(got["x"] + half, abs=0.1 * half)
        assert got == evaluate.interval("x", values)
        widths.append(got["x_high"] - got["x_low"])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)
    assert set(evaluate.interval("x", np.ones(7)).values()) == {1.0}


def test_due():
    done = range(1, 16)
    assert [n for n in done if CONFIG.due(n)] == [5, 10, 15]
    assert not any(dataclasses.replace(CONFIG, every=0).due(n) for n in done)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_problems": -1}, "evaluation.num_problems must not be negative: -1"),
        ({"num_samples": -2}, "evaluation.num_samples must not be negative: -2"),
        ({"every": -1}, "evaluation.every must not be negative: -1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens must be at least 1, not 0"),
        ({"max_prompt_tokens": -3}, "max_prompt_tokens must be at least 1, not -3"),
        ({"num_samples": 0, "greedy": False}, "asks for nothing"),
        ({"stop_strings": ("",)}, "evaluation.stop_strings holds an empty string"),
        ({"top_p": 1.5}, "top_p .* not 1.5"),
    ],
    ids=str,
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
