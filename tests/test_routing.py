"""Rows as the authors publish them, and which reward they go to."""

import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest

from klear_jax.data.examples import read_examples
from klear_jax.errors import InputError
from klear_jax.rewards import routing, sandbox

CODE = {"wrong": -1.0, "max_tests": 2, "isolation": "auto"}
CONFIG = routing.RewardConfig(
    kinds={
        "math": routing.Kind("math", {"wrong": -1.0}),
        "code": routing.Kind("code", CODE),
        "mine": routing.Kind("hostile_rewards:length", {}),
    },
    sources={
        "math_longcot_math_verify": "math",
        "coder1_longcot": "code",
        "own": "mine",
    },
    kind="math",
    full_credit=1.0,
    num_workers=1,
    task_timeout_s=100.0,
    step_timeout_s=1.0,
    memory_mb=64,
)
MATH_ROW = {
    "data_source": "math_longcot_math_verify",
    "prompt": [{"content": "What is $1+1$?", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 7},
}
CODE_ROW = {
    "data_source": "coder1_longcot_taco",
    "prompt": [{"content": "Echo.", "role": "user"}],
    "ability": "code",
    "reward_model": {
        "ground_truth": json.dumps(
            {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"]}
        ),
        "style": "rule",
    },
    "extra_info": {"index": 8},
}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_sandbox(monkeypatch):
    """What is chosen here is another test's; who asks for it, this one's."""
    asked = []
    monkeypatch.setattr(sandbox, "choose", asked.append)
    return asked


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_official_rows(name, tmp_path, no_sandbox):
    path = write(tmp_path / name, [MATH_ROW, CODE_ROW])
    one, two = read_examples(path)
    assert one.problem == "What is $1+1$?"
    assert (one.answer, one.source, one.prompt_id) == (
        "2",
        "math_longcot_math_verify",
        1,
    )
    assert (two.source, two.prompt_id) == ("coder1_longcot_taco", 2)
    assert two.origin == f"{path} {'row' if name == 'data.parquet' else 'line'} 2"
    routing.check(CONFIG, [one])
    assert no_sandbox == []  # Math needs none.
    routing.check(CONFIG, [one, two])
    assert no_sandbox == ["auto"]
    assert routing.ground_truth(CONFIG, one.source, one.answer, "0/1/2") == "2"
    tests = routing.ground_truth(CONFIG, two.source, two.answer, "0/1/2")
    assert len(tests["inputs"]) == 2
    assert tests == routing.ground_truth(CONFIG, two.source, two.answer, "0/1/2")
    chosen = {
        tuple(routing.ground_truth(CONFIG, two.source, two.answer, str(s))["inputs"])
        for s in range(50)
    }
    assert chosen == {("1", "2"), ("1", "3"), ("2", "3")}


@pytest.mark.parametrize(
    "answer", [["2", "4/2"], {"functional": "assert f() == 1"}, 2, 2.5]
)
def test_ground_truths_that_are_not_text(answer, tmp_path):
    row = MATH_ROW | {"reward_model": {"ground_truth": answer}}
    [example] = read_examples(write(tmp_path / "data.jsonl", [row]))
    assert example.answer == (
        str(answer) if isinstance(answer, int | float) else answer
    )


@pytest.mark.parametrize(
    "row, message",
    [
        (
            MATH_ROW | {"reward_model": {"style": "rule"}},
            "line 1: neither answer nor",
        ),
        (
            MATH_ROW | {"reward_model": {"ground_truth": []}},
            "line 1: answer must be",
        ),
        (
            MATH_ROW | {"reward_model": {"ground_truth": [""]}},
            "line 1: answer must",
        ),
        (MATH_ROW | {"answer": {"a": "\ud800"}}, "line 1: answer must be text"),
        (MATH_ROW | {"data_source": 7}, "line 1: data_source must be text: 7"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_examples(write(tmp_path / "data.jsonl", [row]))


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(write(tmp_path / "whole.parquet", [MATH_ROW]).read_bytes()[:100])
    with pytest.raises(InputError, match=r"data.parquet cannot be read .*as parquet"):
        read_examples(path)


def test_the_longest_part_of_a_source_decides():
    sources = CONFIG.sources | {"longcot": "mine"}
    config = dataclasses.replace(CONFIG, sources=sources)
    assert config.kind_of("coder1_longcot_x") == "code"
    assert config.kind_of("other_longcot") == "mine"
    assert config.kind_of("") == "math"


def test_unknown_sources_are_all_named(tmp_path):
    rows = [MATH_ROW | {"data_source": s} for s in ("aime", "lcb", "aime", "own_set")]
    with pytest.raises(
        InputError,
        match=r"'aime' \(2 rows, the first .*data.jsonl line 1\), 'lcb' \(1 rows, .* line "
        r"2\): name it",
    ):
        routing.check(CONFIG, read_examples(write(tmp_path / "data.jsonl", rows)))


def test_tests_must_fit_into_the_time_of_a_task(tmp_path):
    """Or a response would pay for what its row asks."""
    slow = json.dumps({"inputs": list("abc"), "outputs": list("abc"), "timeout": 51})
    row = CODE_ROW | {"reward_model": {"ground_truth": slow}}
    examples = read_examples(write(tmp_path / "data.jsonl", [row]))
    with pytest.raises(
        InputError, match=r"line 1: 2 tests of up to 51.0 s do not fit into .*=100.0"
    ):
        routing.check(CONFIG, examples)


def test_workers_get_what_was_chosen(monkeypatch):
    """And do not choose for themselves, with a log that nobody reads."""
    monkeypatch.setattr(sandbox, "choose", {"auto": "bubblewrap"}.get)
    assert routing.Kind("code", CODE).resolved() == CODE | {"isolation": "bubblewrap"}
    by_name = routing.Kind("klear_jax.rewards.code:score", CODE)
    assert by_name.resolved()["isolation"] == "bubblewrap"
    assert routing.Kind("math", {"wrong": -1.0}).resolved() == {"wrong": -1.0}


def test_tests_are_no_answer_to_a_sum(tmp_path):
    tests = MATH_ROW | {"reward_model": {"ground_truth": {"inputs": ["1"]}}}
    examples = read_examples(write(tmp_path / "data.jsonl", [MATH_ROW, tests]))
    with pytest.raises(InputError, match=r"line 2: an answer for 'math' is text or a"):
        routing.check(CONFIG, examples)


def test_a_reward_that_cannot_work_is_found_at_the_start(tmp_path):
    rows = read_examples(write(tmp_path / "data.jsonl", [MATH_ROW, MATH_ROW]))
    kinds = {"math": routing.Kind("math_judge", {"no_think_end": -0.5})}
    spoilt = dataclasses.replace(
        CONFIG, kinds=kinds, sources={"math": "math"}, task_timeout_s=60, memory_mb=4096
    )
    with routing.make_pool(spoilt) as pool:
        with pytest.raises(
            InputError,
            match=r"rewards.kinds.math \(math_judge, with options \['no_think_end'\]\) fails "
            r"on an empty response to .*line 1: TypeError: .*no_think_end",
        ):
            routing.try_out(pool, spoilt, rows)
        kinds["math"] = routing.Kind("math_judge", {"wrong": -1.0})
        routing.try_out(pool, spoilt, rows)


def test_bad_tests_are_named_by_row(tmp_path):
    bad = CODE_ROW | {"reward_model": {"ground_truth": '{"inputs": ["1"]}'}}
    examples = read_examples(write(tmp_path / "data.jsonl", [CODE_ROW, bad]))
    with pytest.raises(InputError, match=r"line 2: inputs and outputs must be lists"):
        routing.check(CONFIG, examples)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"kinds": CONFIG.kinds | {"math": routing.Kind("math", {"correct": 2.0})}},
            "kinds.math.options.correct is 2.0, but full_credit is 1.0",
        ),
        ({"kind": "maths"}, "kind is scored by 'maths', which is none of kinds"),
        ({"sources": {"x": "y"}}, "x is scored by 'y'"),
        (
            {"kinds": {"math": routing.Kind("nope", {})}, "sources": {}},
            "unknown reward",
        ),
        (
            {"kinds": {"math": routing.Kind("no.module:f", {})}, "sources": {}},
            "there is no module no.module",
        ),
    ],
)
def test_bad_tables_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_code_needs_a_number_of_tests():
    kinds = CONFIG.kinds | {"code": routing.Kind("code", {})}
    with pytest.raises(InputError, match=r"code\.options\.max_tests is not set"):
        dataclasses.replace(CONFIG, kinds=kinds)
