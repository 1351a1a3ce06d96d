"""The small programming tasks: what is asked, what is shown, and what is tested agree."""

import contextlib
import io
import itertools
import json
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from klear_jax.data import arithmetic, programs
from klear_jax.errors import InputError
from klear_jax.rewards import code

TASKS = list(programs.all_tasks())
SETTINGS = {
    "task": "programs",
    "num_problems": 3_000,
    "seed": 1,
    "direct_share": 0.5,
    "generator": {},
}


def execute(program, stdin):
    """Our own programs, so in this process."""
    before, out = sys.stdin, io.StringIO()
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out):
            exec(program, {"__name__": "__main__"})
    finally:
        sys.stdin = before
    return out.getvalue()


@hypothesis.settings(max_examples=300)
@hypothesis.given(task=st.sampled_from(TASKS), rng=st.randoms(use_true_random=False))
def test_the_program_prints_what_the_test_expects(task, rng):
    stdin, stdout = task.test(rng)
    assert execute(task.program(), stdin).strip() == stdout.strip()
    other = task.spoiled(rng)
    assert other != task
    differ = sum(
        getattr(other, part) != getattr(task, part)
        for part in ("fold", "map", "filter", "start")
    )
    assert differ == 1


def test_every_problem_is_said_in_its_own_words():
    assert len({task.words() for task in TASKS}) == len(TASKS) == 13_384


@pytest.fixture(scope="module")
def made():
    return programs.make_problems(**SETTINGS)


def test_splits_are_disjoint_and_by_text(made):
    found = [
        (row.problem, split) for split, rows in made.splits.items() for row in rows
    ]
    assert len({problem for problem, _ in found}) == len(found) == 3_000
    for problem, split in found:
        assert arithmetic.split_of(problem) == split
    again = programs.make_problems(**SETTINGS | {"seed": 2})
    mine, other = ({row.problem for row in x.splits["test"]} for x in (made, again))
    rest = {row.problem for split in ("sft", "rl") for row in again.splits[split]}
    assert mine & other and not mine & rest


def test_rows_hold_a_plan_or_not_and_sixteen_tests(made):
    rows = list(itertools.chain.from_iterable(made.splits.values()))
    by_words = {task.words(): task for task in TASKS}
    direct = right_direct = 0
    for row in rows:
        tests = code.parse(row.answer)
        assert len(tests.cases) == 16 and tests.form == "inputs"
        task, program = by_words[row.problem], code.extract(row.response)
        plan = row.response.partition("</think>")[0].removeprefix("<think>")
        if plan:
            assert (plan, program) == (task.plan(), task.program())
        else:
            direct += 1
            right_direct += program == task.program()
    assert 0.45 < direct / len(rows) < 0.55
    assert 0.2 < right_direct / direct < 0.3
    assert len({row.prompt_id for row in rows}) == len(rows)


def test_the_same_settings_give_the_same_rows(made):
    again = programs.make_problems(**SETTINGS)
    assert again == made
    json.dumps(made.dropped)


def test_too_few_are_refused():
    with pytest.raises(InputError, match="1 programs problems leave"):
        programs.make_problems(**SETTINGS | {"num_problems": 1})


def test_settings_of_another_task_are_refused():
    with pytest.raises(InputError, match="programs have no generator to set min_terms"):
        programs.make_problems(**SETTINGS | {"generator": {"min_terms": 3}})
