"""The code reward: which share of its tests does the program in a response pass.

As the authors' `coder1_longcot` scorer. Programs run in `rewards.sandbox`.

A ground truth is JSON, as text or read, of one of three forms, with `timeout` (seconds a
test, default 35), `max_test_cases` (default 16) and `compare` (default "text") beside:

    {"inputs": [..], "outputs": [..]}    standard input, and what must be printed
    {"functional": "assert .." or [..]}  appended to the program; a list has a test an item
    {"pytest": "from solution import *; def test_..."}

With "lines" for `compare`, output is what LiveCodeBench takes it for: lines without the spaces
around them, of which those that are numbers are compared as such; and programs have what its own
programs have, names that they need not import and deep recursion.

Tests of the first form stay outside: the program sees its input alone. Those of the other
two run in the program's own process, so a program that is out to deceive can. What is
caught is leaving early, by `os._exit(0)` or `sys.exit()`, skipping, and replacing what the
drivers below call: a test counts as passed when a token that is new in each run is printed
behind the last assertion, and with pytest if each test was called and passed. What is not: a
program that looks for the token in its interpreter's frames, whose values claim to be equal
to everything, or that defines for itself what a test calls by name, such as `sorted`.
"""

import ast
import dataclasses
import decimal
import functools
import json
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from klear_jax.errors import InputError
from klear_jax.rewards import sandbox

FORMS = ("inputs", "functional", "pytest")
COMPARISONS = ("text", "lines")
TOGETHER = 16  # Tests of a response that are run in one sandbox, one after the other.


@dataclasses.dataclass(frozen=True)
class Tests:
    """A ground truth that was read."""

    form: str  # Of `FORMS`.
    cases: Sequence[Any]  # (stdin, stdout) pairs, or the text of each test.
    timeout_s: float  # Of one test.
    max_tests: int | None  # Its own limit on how many are run.
    compare: str = "text"  # Of `COMPARISONS`, for the first form.


def parse(ground_truth: str | Mapping[str, Any]) -> Tests:
    """Reads a ground truth; an InputError says what is wrong with it."""
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise InputError(f"tests that are not JSON: {error}") from error
    if not isinstance(tests, Mapping):
        raise InputError(f"tests must be an object, not {type(tests).__name__}")
    # Parquet writes the keys of all rows into each, null where there is nothing.
    tests = {name: value for name, value in tests.items() if value is not None}
    found = [form for form in FORMS if form in tests]
    if len(found) != 1:
        raise InputError(f"tests must be an object with one of the keys {FORMS}")
    [form] = found
    if form == "inputs":
        inputs, outputs = tests["inputs"], tests.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise InputError("inputs and outputs must be lists")
        if len(inputs) != len(outputs):
            raise InputError(f"{len(inputs)} inputs for {len(outputs)} outputs")
        cases: list[Any] = [
            (_text(a), _text(b)) for a, b in zip(inputs, outputs, strict=True)
        ]
    else:
        cases = tests[form]
        cases = [cases] if isinstance(cases, str) else cases
        if not isinstance(cases, list) or not all(isinstance(c, str) for c in cases):
            raise InputError(f"{form} must be text, or a list of texts")
        for case in cases:
            _check_asserts(form, case)
    if not cases:
        raise InputError(f"no tests: {form} is empty")
    timeout_s, most = tests.get("timeout", 35.0), tests.get("max_test_cases")
    if not _is_number(timeout_s) or not 0 < timeout_s <= 3600:
        raise InputError(
            f"timeout must be a number of seconds, up to 3600, not {timeout_s!r}"
        )
    if most is not None and (not _is_number(most) or most != int(most) or most < 1):
        raise InputError(f"max_test_cases must be a positive integer, not {most!r}")
    compare = tests.get("compare", "text")
    if compare not in COMPARISONS:
        raise InputError(f"compare must be one of {COMPARISONS}, not {compare!r}")
    return Tests(form, cases, float(timeout_s), most and int(most), compare)


def _is_number(x: Any) -> bool:
    if not isinstance(x, int | float) or isinstance(x, bool):
        return False
    return abs(x) < 1e300  # No nan, no infinity, and no integer beyond them.


def _check_asserts(form: str, test: str) -> None:
    """Raises an InputError for tests that no program passes, or that any does."""
    try:
        body = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{form} is not Python: {error}") from error
    defines = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)
    if form == "functional" and all(isinstance(part, defines) for part in body):
        raise InputError(f"{form} tests nothing: {test[:60]!r}")


def _text(item: Any) -> str:
    """Standard input or output: text, or a list whose items are joined by ', '."""
    if isinstance(item, list):
        return ", ".join(map(str, item))
    if not isinstance(item, str):
        raise InputError(f"an input or output must be text or a list, not {item!r}")
    return item


def choose_tests(
    ground_truth: str | Mapping[str, Any], seed: int | str, max_tests: int
) -> dict[str, Any]:
    """The ground truth with at most `max_tests` of its tests, the same for the same seed.

    The limit of the ground truth itself goes before `max_tests`; 0 is all of them.
    """
    tests = parse(ground_truth)
    most = tests.max_tests or max_tests or len(tests.cases)
    chosen = range(len(tests.cases))
    if most < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, most))
    cases = [tests.cases[i] for i in chosen]
    if tests.form == "inputs":
        inputs, outputs = zip(*cases, strict=True)
        kept = {"inputs": list(inputs), "outputs": list(outputs)}
    else:
        kept = {tests.form: cases}
    return kept | {
        "timeout": tests.timeout_s,
        "max_test_cases": most,
        "compare": tests.compare,
    }


def score(
    response: str,
    ground_truth: str | Mapping[str, Any],
    *,
    correct: float = 1.0,
    wrong: float = -1.0,
    no_think_end: float = -0.5,
    no_think_start: float = -2.0,
    soft: bool = True,
    max_tests: int = 16,
    seed: int | str = 0,
    memory_mb: int = 1024,
    isolation: str = "auto",
) -> float:
    """The reward of a response that thinks between tags and then writes a program.

    Args:
      response: the decoded sample, thinking included.
      ground_truth: the tests, see above. What cannot be read as such scores wrong, as with
        the authors: `parse` finds it when the data is read.
      correct: the value if all tests pass.
      wrong: the value if none does, or there is no program; between, the value is as far
        as the share of tests that pass. (1, -1) is the authors' 2p - 1, (1, 0) the paper's p.
      no_think_end: the value without `</think>`: the thinking did not end.
      no_think_start: the value with `</think>` but without `<think>`.
      soft: False: all tests must pass, for correct; else wrong. What is left is not run
        after a failure, but for up to `TOGETHER` tests.
      max_tests: how many tests are run, chosen by `seed`, if there are more; 0: all.
      seed: of the choice.
      memory_mb: MiB a test may use.
      isolation: see `sandbox.choose`.

    Raises:
      InputError: programs cannot be isolated here.
      OSError: this time it could not be run.
    """
    if "</think>" not in response:
        return no_think_end
    if "<think>" not in response:
        return no_think_start
    program = extract(response)
    try:
        tests = parse(choose_tests(ground_truth, seed, max_tests))
    except InputError:
        return wrong
    if not program:
        return wrong
    passed = failed = 0
    for start in range(0, len(tests.cases), TOGETHER):
        part = dataclasses.replace(tests, cases=tests.cases[start : start + TOGETHER])
        text = json.dumps(dataclasses.asdict(part), sort_keys=True)
        passes = _passes(program, text, memory_mb=memory_mb, isolation=isolation)
        passed, failed = passed + passes.count(True), failed + passes.count(False)
        if failed and not soft:
            return wrong
    if not failed:
        return correct  # Exactly, which the mean below may miss by a rounding.
    return (correct * passed + wrong * failed) / (passed + failed)


def judge(
    response: str, ground_truth: str | Mapping[str, Any], **options: Any
) -> float:
    """The benchmark's judgement: no tags are asked for. The program is the last one behind the
    last `</think>`, or of the whole text without one. Arguments and errors as in `score`."""
    answer = response.rpartition("</think>")[2]
    return score(f"<think></think>{answer}", ground_truth, **options)


def extract(response: str) -> str | None:
    """The last complete ```python block after the first `</think>`; None: there is none."""
    opening, closing = "```python\n", "\n```"
    answer = response.partition("</think>")[2]
    start = answer.rfind(opening, 0, max(answer.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return answer[start : answer.find(closing, start)]


# The samples of a group repeat programs, and stand together.
@functools.lru_cache(maxsize=32)
def _passes(program: str, tests: str, **limits: Any) -> tuple[bool, ...]:
    tests = Tests(**json.loads(tests))
    if tests.form == "inputs":
        if tests.compare == "lines":
            deep = "import sys\nsys.setrecursionlimit(50_000)\n"
            program = f"{_prelude(program)}\n{deep}{program}"
        programs = [(program, stdin) for stdin, _ in tests.cases]
        expected = [stdout for _, stdout in tests.cases]
    else:
        expected = [secrets.token_hex(16) for _ in tests.cases]
        driver = _DRIVERS[tests.form]
        programs = [
            (
                driver.format(
                    prelude=_prelude(program + "\n" + test),
                    helpers=_HELPERS,
                    program=program,
                    test=test,
                    token=token,
                ),
                "",
            )
            for test, token in zip(tests.cases, expected, strict=True)
        ]
    results = sandbox.run_all(programs, timeout_s=tests.timeout_s, **limits)
    return tuple(
        result.returncode == 0
        and (
            _same(result.stdout, want, tests.compare)
            if tests.form == "inputs"
            else want in result.stdout
        )
        for result, want in zip(results, expected, strict=True)
    )


def _same(got: str, want: str, compare: str) -> bool:
    """Whether what was printed is what should be, as `compare` says."""
    got, want = got.strip(), want.strip()
    if compare == "text":
        return got == want
    return list(map(_line, got.split("\n"))) == list(map(_line, want.split("\n")))


def _line(text: str) -> str | list[decimal.Decimal]:
    """A line of 'lines': its numbers, if it has nothing else."""
    try:
        numbers = [decimal.Decimal(word) for word in text.split()]
    except decimal.InvalidOperation:
        return text.strip()
    # nan is not equal to itself, and some of its kinds cannot be compared.
    return numbers if all(map(decimal.Decimal.is_finite, numbers)) else text.strip()


# The token, and what is still needed, are held by a function, whose names the program does
# not share.
_DRIVERS = {
    "functional": """
def run(write, token, exec, compile, settrace):
    names = {{"__name__": "__main__"}}
    for name, text in (
        ("prelude", {prelude!r}), ("solution", {program!r}), ("tests", {test!r})
    ):
        exec(compile(text, name + ".py", "exec"), names)
        if name == "prelude":
            ours = {{name: names[name] for name in {helpers!r}}}
        else:
            names.update(ours)  # Before the tests, whatever the program calls its own.
            settrace(None)
    write(1, token.encode())

import os, sys
run(os.write, {token!r}, exec, compile, sys.settrace)
""",
    "pytest": """
def run(write, token):
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest
    passed, other = [], []

    class Recorder:
        def pytest_runtest_logreport(self, report):
            good = report.outcome == "passed" and not hasattr(report, "wasxfail")
            (passed if good else other).append(report.when)

    with open("solution.py", "w") as file:
        for text in ({prelude!r}, {program!r}):
            print(f"exec({{text!r}}, globals())", file=file)
    with open("test_solution.py", "w") as file:
        file.write({test!r})
    options = ["-q", "-p", "no:cacheprovider", "test_solution.py"]
    status = pytest.main(options, plugins=[Recorder()])
    if status == pytest.ExitCode.OK and "call" in passed and not other:
        write(1, token.encode())
    raise SystemExit(status)

import os
run(os.write, {token!r})
""",
}

_HELPERS = ("list_node", "tree_node", "is_same_list", "is_same_tree")

# What programs for functional tests may use without importing it. Star imports hide some
# functions of Python (pow, sum); those are put back.
_PRELUDE = '''
import bisect, collections, copy, datetime, decimal, fractions, functools, heapq, itertools
import json, math, operator, os, random, re, statistics, string, sys, time
from typing import *
from functools import *
from collections import *
from itertools import *
from heapq import *
from bisect import *
from string import *
from operator import *
from math import *
from builtins import *
from copy import deepcopy
import bisect  # Which its own star import has made the function.

inf = math.inf


class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right


def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head


def is_same_list(a, b):
    while a and b and a.val == b.val:
        a, b = a.next, b.next
    return a is None and b is None


def tree_node(values):
    """By levels; None where there is no child, without children of its own."""
    values = iter(values or [])
    first = next(values, None)
    root = None if first is None else TreeNode(first)
    row = deque([root] if root else [])
    while row:
        node = row.popleft()
        for side in ("left", "right"):
            value = next(values, None)
            if value is not None:
                setattr(node, side, TreeNode(value))
                row.append(getattr(node, side))
    return root


def is_same_tree(a, b):
    if a is None or b is None:
        return a is b
    sides = is_same_tree(a.left, b.left) and is_same_tree(a.right, b.right)
    return a.val == b.val and sides
'''


def _prelude(program: str) -> str:
    """With numpy and pandas only for programs, or tests, that name them: they take long to
    import."""
    text = _PRELUDE
    for package, name in (("numpy", "np"), ("pandas", "pd")):
        if re.search(rf"\b({name}|{package})\b", program):
            text += (
                f"try:\n    import {package}, {package} as {name}\n"
                "except ImportError:\n    pass\n"
            )
    return text
