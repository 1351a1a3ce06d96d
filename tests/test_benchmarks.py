"""Code benchmarks as they are published: read, asked, and judged through the sandbox."""

import base64
import gzip
import json
import pickletools
import zlib

import pytest

from klear_jax.data import benchmarks
from klear_jax.data.examples import read_examples
from klear_jax.errors import InputError
from klear_jax.rewards import code

HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x: int) -> int:\n    """ Twice x. """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3) == 6\n"
    "    assert candidate(-1) == -2\n",
}
PUBLIC = [{"input": "3\n", "output": "6\n", "testtype": "stdin"}]
HIDDEN = [{"input": "5\n", "output": "10\n", "testtype": "stdin"}]


def pickled(value) -> str:
    """What `pickle.dumps(text)` gives, written by hand: nothing here unpickles or pickles."""
    data = json.dumps(value).encode()
    size = len(data).to_bytes(4, "little")
    return pack(b"\x80\x04X" + size + data + b"\x94.")


def pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def live_code_bench(**other):
    row = {
        "question_title": "Double",
        "question_content": "Read a number and print twice that number.",
        "platform": "atcoder",
        "question_id": "abc1_a",
        "contest_date": "2024-09-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(PUBLIC),
        "private_test_cases": pickled(HIDDEN),
        "metadata": "{}",
    }
    return row | other


def read(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(file)


def judge(example, program, **options):
    return code.judge(
        f"So:\n```python\n{program}\n```\n", example.answer, max_tests=0, soft=False
    )


def test_human_eval(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMAN_EVAL).encode()))
    [example] = read_examples(path)
    assert example.source == "humaneval"
    assert HUMAN_EVAL["prompt"] in example.problem
    solution = HUMAN_EVAL["prompt"] + HUMAN_EVAL["canonical_solution"]
    assert judge(example, solution) == 1
    assert judge(example, solution.replace("2 *", "3 *")) == -1
    assert judge(example, "import sys; sys.exit(0)") == -1


def test_live_code_bench_by_standard_input(tmp_path):
    [example] = read(tmp_path, live_code_bench())
    assert (example.source, example.date) == ("livecodebench", "2024-09-01")
    assert "print twice that number" in example.problem
    assert example.answer == {
        "inputs": ["3\n", "5\n"],
        "outputs": ["6\n", "10\n"],
        "timeout": 6,
        "compare": "lines",
    }
    assert judge(example, "print(2 * int(input()))") == 1
    assert judge(example, "print(6)") == -1  # The hidden test.
    # What its own judge lets pass: numbers as numbers, names that are not imported, recursion.
    assert judge(example, "print(float(2 * int(input())), ' ')") == 1
    deep = "f = lambda n: n and 1 + f(n - 1)\n"
    assert judge(example, deep + "print(f(5_000) * 0 + sum(2 * [int(input())]))") == 1
    assert judge(example, "d = deque([int(input())])\nprint(2 * d[0])") == 1
    assert judge(example, "print(2 * int(input()), 1)") == -1
    assert judge(example, "print('snan')") == -1
    assert judge(example, "print(2 * int(input()))\nprint()\nprint(1)") == -1
    plain = live_code_bench(private_test_cases=json.dumps(HIDDEN))
    assert read(tmp_path, plain)[0].answer == example.answer
    [public] = read(tmp_path, live_code_bench(private_test_cases=""))
    assert public.answer["inputs"] == ["3\n"]


def test_live_code_bench_by_function(tmp_path):
    tests = [
        {"input": '[3, 1]\n"a"', "output": '[[1, 3], "a"]', "testtype": "functional"}
    ]
    row = live_code_bench(
        starter_code="class Solution:\n    def sort(self, x: List[int], s: str):\n        ",
        public_test_cases=json.dumps(tests),
        private_test_cases="",
        metadata=json.dumps({"func_name": "sort"}),
    )
    [example] = read(tmp_path, row)
    assert "class Solution" in example.problem
    right = "class Solution:\n    def sort(self, x, s):\n        return sorted(x), s"
    assert judge(example, right) == 1  # A tuple, where the test has a list.
    assert judge(example, right.replace("sorted(x)", "x")) == -1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"public_test_cases": "[{"}, "test cases that are not JSON"),
        ({"public_test_cases": '{"input": 1}'}, "test cases must be a list"),
        ({"public_test_cases": '[{"input": "1"}]'}, "test cases that are none"),
        (
            {"public_test_cases": "[]", "private_test_cases": ""},
            "test cases that are none",
        ),
        ({"private_test_cases": {"a": 1}}, "test cases must be a list"),
        ({"private_test_cases": "%%%"}, "hidden tests that cannot be unpacked"),
        ({"private_test_cases": "aGk="}, "hidden tests that cannot be unpacked"),
        # What would run a command, were it unpickled.
        (
            {"private_test_cases": pack(b"cos\nsystem\n(X\x04\x00\x00\x00[{}]tR.")},
            "hidden tests that are no pickled text",
        ),
        (
            {"private_test_cases": pack(b"\x80\x04K\x01.")},
            "hidden tests that are no pickled text",
        ),
        ({"starter_code": "class Solution:"}, "metadata without a func_name"),
        (
            {"starter_code": "x", "metadata": '{"func_name": "f(); import os"}'},
            "test cases that are none: .* is no name",
        ),
    ],
    ids=str,
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=rf"rows.jsonl line 2: {message}"):
        read(tmp_path, live_code_bench(), live_code_bench(**change))


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "MOST_BYTES", 1 << 20)
    bomb = pack(b"\x00" * (1 << 22))
    with pytest.raises(InputError, match="hidden tests of more than 1 MiB"):
        read(tmp_path, live_code_bench(private_test_cases=bomb))


def test_pickled_is_a_pickle():
    data = zlib.decompress(base64.b64decode(pickled(HIDDEN)))
    marks = [(mark.name, value) for mark, value, _ in pickletools.genops(data)]
    assert ("BINUNICODE", json.dumps(HIDDEN)) in marks


def test_other_rows_stay_as_they_are():
    row = {"prompt": "x", "answer": "1", "test": "2"}
    assert benchmarks.adapt(row) is row


@pytest.mark.parametrize(
    "response, want",
    [
        ("```python\nprint(1)\n```", 1),
        ("<think>\n```python\nprint(2)\n```\n</think>\n```python\nprint(1)\n```", 1),
        ("<think>\n```python\nprint(1)\n```\n</think>\n```python\nprint(2)\n```", -1),
        ("<think>\n```python\nprint(1)\n```\n</think>\nno program", -1),
        ("print(1)", -1),
        ("```python\nprint(2)\n```\nBetter:\n```python\nprint(1)\n```", 1),
    ],
)
def test_judge_asks_for_no_tags(response, want):
    assert code.judge(response, {"inputs": [""], "outputs": ["1"]}) == want
