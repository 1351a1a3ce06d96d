"""The code reward: the authors' verdicts, its forms of tests, and who tries to cheat."""

import functools
import json
import math
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest
from test_sandbox import works

from klear_jax.errors import InputError
from klear_jax.rewards import code, sandbox

needs_sandbox = pytest.mark.skipif(
    not works("bubblewrap"), reason="no bubblewrap: apt-get install bubblewrap"
)
GOLDEN = pathlib.Path(__file__).parent / "golden" / "code_reward.jsonl"
GOLDEN = [json.loads(line) for line in GOLDEN.read_text().splitlines()]


@needs_sandbox
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["category"])
def test_verdicts_are_those_of_the_authors(case):
    got = code.score(case["response"], case["ground_truth"])
    if case["category"] == "over16_partial_random":
        # They draw 16 tests for each response; we, the same for a group.
        assert (got + 1) * 8 == round((got + 1) * 8)
        assert got == code.score(case["response"], case["ground_truth"])
    elif case["data_source"] == "coder1":
        # They ask for no tags there, but find no program without </think> all the same. For
        # us it is an unknown source: which reward a row has, the config's table says.
        assert got == -0.5
    else:
        assert got == case["score"]


def answer(program):
    return f"<think>\nhm\n</think>\n```python\n{program}\n```"


TESTS = {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "9", "9"], "timeout": 5}


@needs_sandbox
@pytest.mark.parametrize(
    "options, want",
    [
        ({}, 0.0),
        ({"wrong": 0.0}, 0.5),  # The paper's pass rate.
        ({"soft": False}, -1.0),
        ({"correct": 2.0, "wrong": 1.0}, 1.5),
    ],
)
def test_soft_and_hard(options, want):
    assert code.score(answer("print(input())"), TESTS, **options) == want
    whole = TESTS | {"outputs": TESTS["inputs"]}
    best = options.get("correct", 1.0)
    assert code.score(answer("print(input())"), whole, **options) == best


def test_what_is_expected_never_goes_in(monkeypatch):
    seen = []

    def run_all(programs, **limits):
        seen.append((programs, limits))
        return [sandbox.Result("x", "", 0, False)] * len(programs)

    monkeypatch.setattr(sandbox, "run_all", run_all)
    tests = {"inputs": ["in1", "in2"], "outputs": ["SECRET1", "SECRET2"], "timeout": 3}
    assert code.score(answer("print(1)"), tests, memory_mb=77, isolation="auto") == -1
    [(programs, limits)] = seen
    assert programs == [("print(1)", "in1"), ("print(1)", "in2")]
    assert limits == {"timeout_s": 3.0, "memory_mb": 77, "isolation": "auto"}
    assert "SECRET" not in repr(seen)


CHEATS = {
    "leaves": "import os; os._exit(0)",
    "exits": "raise SystemExit(0)",
    "exits later": "def f(x):\n    exit(0)",
    "prints nothing": "import builtins; builtins.print = lambda *a, **k: None",
    "no exec": "import builtins; builtins.exec = lambda *a: None",
    "no compile": "import builtins; builtins.compile = lambda *a, **k: None",
    "no write": "import os; os.write = lambda *a: None\nos.close(1)",
    "no error": "import builtins; builtins.AssertionError = ValueError",
    "swallows": "import sys; sys.excepthook = lambda *a: None",
    "leaves at the end": "import atexit, os; atexit.register(os._exit, 0)",
    "shadows": "def run(*a): pass\nassert_ = None\nnames = {}",
    "skips": "import pytest\ndef f(x): pytest.skip()",
    "skips unittest": "import unittest\ndef f(x): raise unittest.SkipTest",
    "skips all": "import pytest\npytestmark = pytest.mark.skip",
    "expects to fail": "import pytest\ndef f(x): pytest.xfail()",
    "jumps": """
import sys
def trace(frame, event, arg):
    if frame.f_code.co_filename in ("tests.py", "test_solution.py") and event == "line":
        frame.f_lineno = frame.f_lineno + 1
    return trace
sys.settrace(trace)
""",
}


@needs_sandbox
@pytest.mark.parametrize("form", ["functional", "pytest"])
@pytest.mark.parametrize("cheat", CHEATS)
def test_obvious_cheats_do_not_pass(form, cheat):
    test = "assert f(1) == 2"
    if form == "pytest":
        test = f"from solution import *\ndef test_f():\n    {test}"
    tests = {form: test, "timeout": 20}
    program = f"def f(x):\n    return 0\n{CHEATS[cheat]}"
    assert code.score(answer(program), tests) == -1


@needs_sandbox
def test_the_helpers_of_tests_are_ours():
    program = "def f(x): return 0\ndef is_same_list(a, b): return True"
    tests = {"functional": "assert is_same_list(f([1]), list_node([9]))"}
    assert code.score(answer(program), tests) == -1
    own = "def f(x): return list_node(x)\ndef is_same_list(a, b): return False"
    tests = {"functional": "assert is_same_list(f([9]), list_node([9]))"}
    assert code.score(answer(own), tests) == 1


@needs_sandbox
def test_what_programs_for_functional_tests_may_use():
    program = """
from __future__ import annotations
def build(values: List[int]) -> Optional[TreeNode]:
    q = deque(values); heappush([], 1); bisect.bisect_left([1], 1); bisect_left([1], 1)
    return list_node([1, 2]), tree_node([1, None, 2, 3]), np.arange(3), pow(2, 10, 7), sqrt(4), inf
"""
    tests = [
        "assert is_same_list(build([1])[0], list_node([1, 2]))",
        "assert not is_same_list(build([1])[0], list_node([1]))",
        "r = build([1])[1]; assert r.right.left.val == 3 and r.left is None",
        "assert is_same_tree(build([1])[1], tree_node([1, None, 2, 3]))",
        "assert not is_same_tree(build([1])[1], tree_node([1, 2, 3]))",
        "assert build([1])[2].tolist() == [0, 1, 2] and build([1])[3:] == (2, 2.0, inf)",
    ]
    assert code.score(answer(program), {"functional": tests, "timeout": 20}) == 1
    tests = ["assert np.allclose(half(1), 0.5)"]  # Named by the test alone.
    program = "def half(x): return x / 2"
    assert code.score(answer(program), {"functional": tests, "timeout": 20}) == 1


@needs_sandbox
def test_pytest_runs_several_tests_with_its_own_features():
    test = """
import pytest
from solution import double
@pytest.mark.parametrize("x", [1, 2])
def test_double(x): assert double(x) == 2 * x
def test_error():
    with pytest.raises(TypeError): double(None)
"""
    good = "def double(x):\n    return x + x"
    assert code.score(answer(good), {"pytest": test}) == 1
    assert code.score(answer("def double(x): return 2"), {"pytest": test}) == -1
    assert code.score(answer(good), {"pytest": "x = 1"}) == -1  # No test, no pass.


@pytest.mark.parametrize(
    "tests, message",
    [
        ("{not json", "tests that are not JSON"),
        ("[1]", "must be an object, not list"),
        ({"inputs": None, "outputs": ["1"]}, "one of the keys"),
        ({"foo": 1}, "one of the keys"),
        ({"inputs": ["1"], "functional": "x"}, "one of the keys"),
        ({"inputs": "1", "outputs": ["1"]}, "inputs and outputs must be lists"),
        ({"inputs": ["1"]}, "inputs and outputs must be lists"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 inputs for 2 outputs"),
        ({"inputs": [], "outputs": []}, "no tests: inputs is empty"),
        ({"inputs": [1], "outputs": ["1"]}, "must be text or a list, not 1"),
        ({"functional": []}, "no tests: functional is empty"),
        ({"functional": [1]}, "functional must be text, or a list of texts"),
        ({"pytest": {}}, "pytest must be text, or a list of texts"),
        (
            {"functional": "x", "timeout": 0},
            "timeout must be a number of seconds, up to 3600, not 0",
        ),
        ({"functional": "x", "timeout": "1"}, "timeout must be a number of seconds"),
        (
            {"functional": "x", "timeout": math.inf},
            "timeout must be a number of seconds",
        ),
        ({"functional": "x", "timeout": True}, "timeout must be a number of seconds"),
        ({"functional": "x", "max_test_cases": 0}, "max_test_cases must be a positive"),
        ({"functional": ""}, "functional tests nothing: ''"),
        (
            {"functional": ["x", "def check(f):\n  assert f"]},
            "functional tests nothing",
        ),
        ({"pytest": "def test_:"}, "pytest is not Python: expected"),
    ],
)
def test_bad_tests_are_named(tests, message):
    with pytest.raises(InputError, match=message):
        code.parse(tests)
    assert code.score(answer("print(1)"), tests) == -1


@hypothesis.given(
    n=st.integers(1, 40), most=st.integers(0, 20), seed=st.text(max_size=5)
)
def test_tests_are_chosen_by_the_seed(n, most, seed):
    tests = {
        "inputs": [str(i) for i in range(n)],
        "outputs": [f"o{i}" for i in range(n)],
    }
    got = code.choose_tests(tests, seed, most)
    assert got == code.choose_tests(json.dumps(tests), seed, most)
    assert got == code.choose_tests(got, "another", most)  # No more is left to choose.
    assert len(got["inputs"]) == (min(n, most) or n if most else n)
    assert got["outputs"] == [f"o{i}" for i in got["inputs"]]
    assert sorted(map(int, set(got["inputs"]))) == [int(i) for i in got["inputs"]]
    own = code.choose_tests(tests | {"max_test_cases": 2}, seed, most)
    assert len(own["inputs"]) == min(n, 2)


def test_every_test_has_the_same_chance():
    tests = {"inputs": [str(i) for i in range(20)], "outputs": [""] * 20}
    drawn = [i for s in range(500) for i in code.choose_tests(tests, s, 16)["inputs"]]
    assert {drawn.count(str(i)) for i in range(20)} <= set(range(360, 441))


PIECES = ["</think>", "<think>", "```python\n", "\n```", "x", "\n", "```", "python"]


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_extract_is_the_authors_expression(response):
    match = re.search(r"</think>.*```python\n(.*?)\n```", response, re.DOTALL)
    assert code.extract(response) == (match and match[1])


def test_all_or_nothing_stops_at_a_failure(monkeypatch):
    """After the part of the tests in which it was: a hanging program costs no hours."""
    ran = []
    run_all = code.sandbox.run_all

    def count(programs, **limits):
        ran.append(len(programs))
        return run_all(programs, **limits)

    monkeypatch.setattr(code.sandbox, "run_all", count)
    tests = {"inputs": list("abcdefghijklmnopqrst")}
    tests["outputs"] = ["!", *tests["inputs"][1:]]
    answer = "<think></think>\n```python\nprint(input())\n```"
    score = functools.partial(code.score, answer, tests, max_tests=0)
    assert score(soft=False) == -1
    assert ran == [16]
    assert score() == pytest.approx(1 - 2 / 20)
    assert ran == [16, 4]


@needs_sandbox
def test_full_credit_is_exact():
    """Three tenths over three are not a tenth, and would not count as right."""
    tests = {"inputs": list("abc"), "outputs": list("abc")}
    got = code.score(answer("print(input())"), tests, correct=0.1, wrong=0.0)
    assert got == 0.1
