"""What is said of samples whose answers are known, what is kept of them, and the judge."""

import contextlib
import dataclasses
import json
import pathlib
import types
from concurrent import futures

import numpy as np
import pytest

from configs.variants import evaluate_paper
from klear_jax import answers, evaluate, sampler
from klear_jax.answers import key_of
from klear_jax.data import cleaning, prepare
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Outcome
from klear_jax.sampling import Sampling

CONFIG = evaluate.EvaluationConfig(
    data="",
    split="test",
    since="",
    until="",
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
GREEDY = [[[1]], [[0, 1]], [[0]]]
PROBLEMS = {
    "tokens": [[5], [6], [7]],
    "prompt_ids": [0, 1, 2],
    "answers": ["a", "b", "c"],
    "problems": ["x", "y", "z"],
    "messages": [[{"role": "user", "content": c}] for c in "xyz"],
    "sources": ["", "", ""],
    "data": ["d", "d", "d"],
}
VOTES = {"1": 1.0, "0 1": 1.0, "1 0": 2.0, "0": 3.0}


class Tokenizer:
    stop_ids = (1,)

    def decode(self, ids):
        return " ".join(map(str, ids))


class Pool:
    """Right with a 1; the response that the test says cannot be scored is an error."""

    def __init__(self, unscored=None):
        self.unscored = unscored

    def submit(self, kind, response, ground_truth, **options):
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
            for j, begun in enumerate(group.samples):
                if begun.finished:
                    continue
                tokens = answers[i][j]
                logprobs = np.zeros(len(tokens), np.float32)
                on_finish(i, j, sampler.Sample(tokens, logprobs, tokens[-1] == 1))
        return groups, {}

    monkeypatch.setattr(sampler, "sample_groups", sample_groups)
    return calls


def run(config, pool=None, problems=PROBLEMS, **kept):
    """All rows."""
    c = types.SimpleNamespace(
        evaluation=config,
        rewards=REWARDS,
        sampler=sampler.Engine(num_slots=2),
        dtype="float32",
    )
    return evaluate.draw(
        {}, None, problems, Tokenizer(), pool or Pool(), c, None, print, **kept
    )


def test_known_answers_give_known_numbers(calls):
    rows = run(CONFIG)
    votes = {key_of(row): VOTES.get(row["response"], 0.0) for row in rows}
    metrics = evaluate.summary(rows, votes)
    bounds = {name for name in metrics if name.endswith(("_low", "_high"))}
    assert {name: value for name, value in metrics.items() if name not in bounds} == {
        "problems": 3,
        "avg@4": pytest.approx((3 / 4 + 0 + 1) / 3),
        "accuracy": pytest.approx((3 / 4 + 0 + 1) / 3),
        "pass@1": pytest.approx((3 / 4 + 0 + 1) / 3),
        "pass@2": pytest.approx(2 / 3),  # Two of four cannot both be the wrong one.
        "pass@4": pytest.approx(2 / 3),
        "maj@1": pytest.approx((3 / 4 + 0 + 1) / 3),
        "maj@2": pytest.approx((3 / 4 + 0 + 1) / 3),  # Two that differ are a tie.
        "maj@4": pytest.approx(2 / 3),
        "length": 17 / 12,
        "length_p50": 1,
        "length_p90": 2,
        "length_max": 3,
        "truncated": 6 / 12,
        "greedy": pytest.approx(2 / 3),
        "scoring_errors": 0,
    }
    assert bounds == {"avg@4_low", "avg@4_high", "greedy_low", "greedy_high"}
    assert metrics["avg@4_low"] < metrics["avg@4"] < metrics["avg@4_high"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert [row["greedy"] for row in rows] == [False] * 12 + [True] * 3
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
    greedy = evaluate.summary(run(dataclasses.replace(CONFIG, num_samples=0)))
    assert greedy.keys() == {
        "problems",
        "greedy",
        "greedy_low",
        "greedy_high",
        "accuracy",
        *("length", "length_p50", "length_p90", "length_max", "truncated"),
        "scoring_errors",
    }
    assert greedy["accuracy"] == greedy["greedy"] == pytest.approx(2 / 3)
    three = dataclasses.replace(CONFIG, num_samples=3, greedy=False)
    three = evaluate.summary(run(three))
    assert [name for name in three if "pass" in name] == ["pass@1", "pass@2", "pass@3"]
    assert three["avg@3"] == pytest.approx(2 / 3)
    assert not any("maj" in name or "greedy" in name for name in three)
    assert len(calls) == 2


def test_what_could_not_be_scored_is_counted_and_not_right(calls):
    metrics = evaluate.summary(run(CONFIG, Pool(unscored="0 1")))
    assert metrics["scoring_errors"] == 3  # Two samples, a greedy one.
    assert metrics["avg@4"] == pytest.approx((2 + 0 + 3) / 12)
    assert metrics["greedy"] == pytest.approx(1 / 3)


def test_results_and_their_tables(calls):
    problems = PROBLEMS | {"data": ["one", "one", "two"]}
    rows = run(CONFIG, problems=problems)
    votes = {key_of(row): VOTES.get(row["response"], 0.0) for row in rows}
    result = evaluate.results(rows, votes)
    assert result["by_data"].keys() == {"one", "two"}
    assert result["by_data"]["one"]["avg@4"] == 3 / 8
    assert result["by_data"]["two"]["greedy"] == 0
    assert result["per_problem"][0] == {
        "prompt_id": 0,
        "data": "one",
        "problem": "x",
        "samples": 4,
        "right": 3,
        "greedy": 1.0,
        "majority": 1.0,
        "truncated": 0.5,
        "length": 1.5,
    }
    assert [one["right"] for one in result["per_problem"]] == [3, 0, 4]
    text = evaluate.markdown(result)
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert all(len(line) == len(lines[0]) for line in lines[:5])
    assert [line[1].strip() for line in lines[2:5]] == ["all", "one", "two"]
    assert "| 58.3% (0.0 - 100.0) |" in text
    assert "| one 0 | x | 3 | 4 | 1 | 1 | 50% | 2 |" in text
    one_set = evaluate.results(run(CONFIG), None)
    assert "by_data" not in one_set and one_set["per_problem"][0]["majority"] is None


def test_an_excerpt_leaves_out_what_all_problems_begin_with():
    asked = [
        ("a", "Solve it: one  two"),
        ("a", "Solve it: one 2"),
        ("b", "Solve it: 3"),
    ]
    problems = [{"data": data, "problem": text} for data, text in asked]
    assert evaluate._excerpts(problems) == ["two", "2", "Solve it: 3"]


def test_answers_are_kept_and_an_evaluation_goes_on(calls, monkeypatch, tmp_path):
    """Whatever of them had come when it was cut off, also where files were half written."""
    monkeypatch.setattr(answers, "FLUSH_S", -1)  # A file an answer.
    path = tmp_path / "samples.jsonl"
    with answers.Answers(path, "m") as kept:
        rows = run(CONFIG, add=kept.add)
        parts = sorted((tmp_path / "samples.jsonl.parts").iterdir())
        contents = [part.read_text() for part in parts]
        assert len(parts) == 15
        kept.finish(rows)
    whole = path.read_text()
    assert not parts[0].parent.exists()
    assert [json.loads(line) for line in whole.splitlines()] == [
        row | {"made_with": "m"} for row in rows
    ]
    assert json.loads(whole.splitlines()[1]) == {
        "prompt_id": 0,
        "greedy": False,
        "sample": 1,
        "data": "d",
        "prompt": [{"role": "user", "content": "x"}],
        "response": "0 1",
        "answer": "a",
        "data_source": "",
        "reward": 1.0,
        "reward_status": "ok",
        "correct": True,
        "finished": True,
        "num_tokens": 2,
        "made_with": "m",
    }
    rng = np.random.default_rng(0)
    for number in (0, 4, 15):
        path.unlink(missing_ok=True)
        parts[0].parent.mkdir()
        survived = rng.permutation(15)[:number]
        for i in survived:
            parts[i].write_text(contents[i])
        (parts[0].parent / "0_000099.jsonl.writing").write_text('{"prompt_')
        added = []
        with answers.Answers(path, "m") as kept:
            assert len(kept.found) == number
            rows = run(CONFIG, found=kept.found, add=added.append)
            kept.finish(rows)
        assert path.read_text() == whole
        had = {key_of(json.loads(contents[i])) for i in survived}
        assert {key_of(row) for row in added} | had == {key_of(row) for row in rows}
        assert len(added) == 15 - number
    # A file that is there is gone on with, too: here, for more samples.
    path.write_text(
        "".join(line for line in whole.splitlines(True) if '"sample": 0' in line)
    )
    with answers.Answers(path, "m") as kept:
        assert len(kept.found) == 6
        kept.finish(run(CONFIG, found=kept.found))
    assert path.read_text() == whole
    with pytest.raises(InputError, match=r"line 1 is not of this model, data and eval"):
        answers.Answers(path, "another")
    assert len(answers.Answers(path, "m").found) == 15
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(
        InputError, match=r"line \d+ is not of this model, data and eva"
    ):
        answers.Answers(path, "m")


def test_answers_that_say_nothing_are_drawn_again(calls):
    """To a problem that has changed, or without a verdict."""
    found = {key_of(row): row for row in run(CONFIG)}
    assert evaluate.still_asked(found, PROBLEMS) == found
    other = PROBLEMS | {
        "answers": ["a", "B", "c"],
        "messages": [*PROBLEMS["messages"][:2], [{"role": "user", "content": "Z"}]],
    }
    same = evaluate.still_asked(found, other)
    assert same == {key: row for key, row in found.items() if key[0] == 0}
    late = found | {(0, False, 0): found[0, False, 0] | {"reward": None}}
    assert late.keys() - evaluate.still_asked(late, PROBLEMS).keys() == {(0, False, 0)}
    tests = [{"inputs": ["1" * 2_000], "outputs": [str(i)]} for i in range(3)]
    programs = PROBLEMS | {"answers": tests}
    rows = json.loads(json.dumps(run(CONFIG, problems=programs)))
    assert len(rows[0]["answer"]) == 71  # Not megabytes of tests for each sample.
    found = {key_of(row): row for row in rows}
    assert evaluate.still_asked(found, programs) == found
    programs["answers"] = [*tests[:2], {**tests[2], "timeout": 7}]
    same = evaluate.still_asked(found, programs)
    assert {key[0] for key in same} == {0, 1}
    fewer = {name: values[:1] for name, values in PROBLEMS.items()}
    found = {key_of(row): row for row in run(CONFIG)}
    same = evaluate.still_asked(found, fewer)
    assert {key[0] for key in same} == {0} and len(same) == 5


def test_answers_are_of_the_weights_and_rewards_they_were_made_with(tmp_path):
    tokenizer = types.SimpleNamespace(fingerprint="t")
    model = types.SimpleNamespace(yarn=None)
    c = evaluate.CommandConfig(0, "", "", model, "float32", None, None, REWARDS, CONFIG)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    path = str(tmp_path)

    def made_with(**changes):
        return evaluate.fingerprint(dataclasses.replace(c, **changes), path, tokenizer)

    first = made_with()
    assert first == made_with()
    assert first == made_with(rewards=dataclasses.replace(REWARDS, num_workers=8))
    others = [
        made_with(dtype="bfloat16"),
        made_with(rewards=dataclasses.replace(REWARDS, full_credit=0.5)),
        made_with(
            rewards=dataclasses.replace(REWARDS, sources={"x": "math"}),
        ),
    ]
    weights.write_bytes(bytes((1 << 20) - 1) + b"1")  # Trained on, say.
    others.append(made_with())
    (tmp_path / "config.json").write_text("{ }")
    others.append(made_with())
    assert len({first, *others}) == 6


def test_several_processes_join_before_signals_are_watched(monkeypatch):
    """JAX takes SIGTERM for itself when they join: watched before, it would not be heard."""
    order = []
    monkeypatch.setattr(evaluate.hosts, "join", lambda: order.append("join"))

    @contextlib.contextmanager
    def watch(grace_s):
        order.append("watch")
        yield

    monkeypatch.setattr(evaluate.preemption, "watch", watch)
    monkeypatch.setattr(evaluate, "run", lambda *_: order.append("run"))
    evaluate.main(["evaluate", "--config=configs/gppo_tiny.py", "--model=x"])
    assert order == ["join", "watch", "run"]


def test_answers_make_pass_rates(calls, tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = run(CONFIG)
    with answers.Answers(path, "m") as kept:
        kept.finish(rows)
    rates = prepare.read_pass_rates((str(path),))
    hashes = list(map(cleaning.prompt_hash, PROBLEMS["messages"]))
    assert [rates[one] for one in hashes] == [
        0.75,
        0.0,
        1.0,
    ]  # Greedy ones do not count.
    # Nor does what could not be scored.
    rows[1]["reward"], rows[1]["correct"] = None, False
    path.write_text("\n".join(map(json.dumps, rows)))
    assert prepare.read_pass_rates((str(path),))[hashes[0]] == 2 / 3


BENCHMARKS = pathlib.Path(__file__).parent / "golden" / "benchmarks"


@pytest.mark.parametrize("name", ["aime24.qs", "aime25.qs", "HMMT-202502"])
def test_recorded_answers_are_all_right_and_others_all_wrong(name):
    """Read, asked, judged in workers and summed up as the command does. (The authors' judge
    gives 0% for HMMT.)"""
    c = evaluate_paper.get_config()
    config = dataclasses.replace(
        CONFIG,
        data=str(BENCHMARKS / f"{name}.jsonl"),
        split="",
        kinds={"math": routing.Kind(**c.evaluation.kinds.math.to_dict())},
        max_prompt_tokens=4_096,
    )
    tokenizer = type("T", (), {"prompt": lambda self, messages: [1]})()
    rewards = config.rewards(REWARDS)
    with routing.make_pool(
        dataclasses.replace(rewards, memory_mb=4096, num_workers=2, task_timeout_s=60.0)
    ) as pool:
        problems = evaluate.load_problems(config, tokenizer, REWARDS, pool)
        assert problems["data"] == [name.split(".")[0]] * 30
        for wrong in (False, True):
            said = [
                f"Thus the answer is \\boxed{{{'2718281' if wrong else answer}}}."
                for answer in problems["answers"]
            ]
            waiting = [
                pool.submit("math_judge", text, answer)
                for text, answer in zip(said, problems["answers"], strict=True)
            ]
            rows = [
                {
                    "prompt_id": i,
                    "greedy": False,
                    "sample": 0,
                    "data": name,
                    "data_source": "",
                    "response": said[i],
                    "reward": one.result().score,
                    "correct": one.result().score == rewards.full_credit,
                    "finished": True,
                    "num_tokens": 1,
                }
                for i, one in enumerate(waiting)
            ]
            votes = evaluate.count_votes(rows, pool, rewards)
            metrics = evaluate.summary(rows, votes)
            for metric in ("accuracy", "avg@1", "pass@1", "maj@1"):
                assert metrics[metric] == float(not wrong), metric
            assert metrics["problems"] == 30
            assert (
                len(set(votes.values())) == 1
                if wrong
                else len(set(votes.values())) > 20
            )


def test_votes_are_one_an_answer():
    texts = [
        "\\boxed{5}",
        "it is $5$",
        "<think>\\boxed{7}</think> \\boxed{5}",
        "",
        "\\boxed{6}",
    ]
    rows = [
        {
            "prompt_id": 0,
            "greedy": False,
            "sample": i,
            "data_source": "",
            "response": text,
        }
        for i, text in enumerate(texts)
    ]
    rewards = dataclasses.replace(REWARDS, memory_mb=4096, task_timeout_s=60.0)
    with routing.make_pool(rewards) as pool:
        five, also, after, none, six = evaluate.count_votes(
            rows, pool, rewards
        ).values()
        assert five == also == after != six
        assert none == 0.0
        numbers = dataclasses.replace(
            rewards, kinds={"math": routing.Kind("last_number", {})}
        )
        for row, text in zip(
            rows, ["12", "so 12.0", "-12", "none", "1,200"], strict=True
        ):
            row["response"] = text
        a, b, c, none, d = evaluate.count_votes(rows, pool, numbers).values()
        assert a == b and len({a, c, d, none}) == 4 and none == 0.0
        programs = dataclasses.replace(
            rewards, kinds={"math": routing.Kind("os:x", {})}
        )
        assert evaluate.count_votes(rows, pool, programs) is None


def test_problems_of_a_window(tmp_path):
    days = ["2024-07-31", "2024-08-01", "2025-01-15", "2025-02-01"]
    file = tmp_path / "dated.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": day, "answer": "1", "date": f"{day}T00:00:00"}) + "\n"
            for day in days
        )
    )
    tokenizer = type("T", (), {"prompt": lambda self, messages: [1]})()

    def load(**window):
        config = dataclasses.replace(CONFIG, data=str(file), split="", **window)
        return evaluate.load_problems(config, tokenizer, REWARDS, Pool())

    assert load()["problems"] == days
    assert load(since="2024-08-01", until="2025-01-31")["problems"] == days[1:3]
    assert load(since="2024-08-01", num_problems=2)["problems"] == days[1:3]
    assert load(until="2024-08-01")["prompt_ids"] == [1, 2]
    with pytest.raises(
        InputError, match=r"dated.jsonl has no problem from 2026-01-01 to"
    ):
        load(since="2026-01-01")
    two = f"{file},{file}"
    both = dataclasses.replace(CONFIG, data=two, split="", num_problems=3)
    found = evaluate.load_problems(both, tokenizer, REWARDS, Pool())
    assert found["data"] == [str(file)] * 6  # Both are called 'dated'.
    assert found["prompt_ids"] == list(range(6))
    assert found["problems"] == days[:3] * 2
    file.write_text('{"prompt": "x", "answer": "1"}')
    with pytest.raises(
        InputError, match=r"line 1 has no date, for evaluation.since and"
    ):
        load(since="2024-08-01")


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
        ({"since": "August"}, "evaluation.since must be a day such as 2025-02-01"),
        ({"until": "2025-02-30"}, "evaluation.until must be a day .* not '2025-02-30'"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens must be at least 1, not 0"),
        ({"max_prompt_tokens": -3}, "max_prompt_tokens must be at least 1, not -3"),
        ({"num_samples": 0, "greedy": False}, "asks for nothing"),
        ({"stop_strings": ("",)}, "evaluation.stop_strings holds an empty string"),
        ({"top_p": 1.5}, "top_p .* not 1.5"),
        ({"temperature": 0.0}, "evaluation.temperature is 0, so all samples would be"),
    ],
    ids=str,
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
