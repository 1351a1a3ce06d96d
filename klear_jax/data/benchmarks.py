"""Rows of code benchmarks as they are published, HumanEval's and LiveCodeBench's -> our rows."""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from klear_jax.data.rows import BadRow

# By which its rows are known.
LIVE_CODE_BENCH = {"question_content", "public_test_cases"}
MOST_BYTES = 1 << 30  # Of the hidden tests of a problem, unpacked.
TIMEOUT_S = 6  # Of a test [LiveCodeBench].
# [R] How the authors' code prompts begin.
EXPERT = (
    "You are an expert Python programmer. You will be given a question (problem "
    "specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\n"
)


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of HumanEval or of LiveCodeBench as one of ours; any other as it is.

    Raises:
      BadRow: it is one of them, and cannot be read.
    """
    if {"task_id", "entry_point", "test", "prompt"} <= row.keys():
        return _human_eval(row)
    if row.keys() >= LIVE_CODE_BENCH:
        return _live_code_bench(row)
    return row


def in_own_words(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with its problem as `prompt`, without what `adapt` puts around it and without tests:
    for who looks for the problem in other texts. HumanEval's have that."""
    if row.keys() >= LIVE_CODE_BENCH:
        return {"prompt": row["question_content"]}
    return row


def _human_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    test = f"{row['test']}\n\ncheck({row['entry_point']})"
    return {
        "prompt": f"{EXPERT}Complete this function, and give the whole of it in a block of "
        f"Python:\n\n```python\n{row['prompt']}```",
        "answer": {"functional": [test], "timeout": TIMEOUT_S},
        "data_source": "humaneval",
    }


def _live_code_bench(row: Mapping[str, Any]) -> dict[str, Any]:
    starter = row.get("starter_code")
    if starter:
        form = (
            "Complete this code, and give the whole of it in a block of Python:\n\n"
            f"```python\n{starter}\n```"
        )
    else:
        form = (
            "Read from standard input, write the answer to standard output, and give the "
            "program in a block of Python:\n\n```python\n# your program\n```"
        )
    tests = [*_tests(row["public_test_cases"]), *_hidden(row.get("private_test_cases"))]
    name = None
    if starter:
        try:
            name = json.loads(row.get("metadata") or "{}")["func_name"]
        except (ValueError, TypeError, KeyError):
            raise BadRow("metadata without a func_name") from None
    return {
        "prompt": f"{EXPERT}Question: {row['question_content']}\n\n{form}",
        "answer": _answer(tests, name),
        "data_source": "livecodebench",
        "date": str(row.get("contest_date") or "")[:10],
    }


def _answer(tests: list[Mapping[str, str]], name: str | None) -> dict[str, Any]:
    try:
        pairs = [(test["input"], test["output"]) for test in tests]
        if name is None:
            inputs, outputs = zip(*pairs, strict=True)
            found: dict[str, Any] = {"inputs": list(inputs), "outputs": list(outputs)}
            found["compare"] = "lines"  # [LiveCodeBench]
        else:
            found = {"functional": [_call(name, *pair) for pair in pairs]}
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise BadRow("test cases that are none", str(error)) from None
    return found | {"timeout": TIMEOUT_S}


def _call(name: str, arguments: str, output: str) -> str:
    """A test that calls the method of that name. Arguments are JSON, one a line; tuples count as
    lists."""
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name")
    values = [json.loads(line) for line in arguments.split("\n")]
    want = json.loads(output)
    return (
        f"import json\ngot = Solution().{name}(*{values!r})\n"
        f"assert json.loads(json.dumps(got)) == {want!r}\n"
    )


def _tests(text: Any) -> list[Mapping[str, str]]:
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise BadRow("test cases that are not JSON", str(error)) from None
    if not isinstance(found, list):
        raise BadRow("test cases must be a list")
    return found


def _hidden(text: Any) -> list[Mapping[str, str]]:
    """The private tests: JSON, or such JSON pickled, compressed and in base64. Nothing is
    unpickled: a pickle of text is its text and a few marks."""
    if not text:
        return []
    if not isinstance(text, str) or text.lstrip()[:1] == "[":
        return _tests(text)
    try:
        unpack = zlib.decompressobj()
        data = unpack.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if unpack.unconsumed_tail:
            raise BadRow(f"hidden tests of more than {MOST_BYTES >> 20} MiB")
        marks = list(pickletools.genops(data))
    except (ValueError, zlib.error, binascii.Error) as error:
        raise BadRow("hidden tests that cannot be unpacked", str(error)) from None
    texts = [value for mark, value, _ in marks if "UNICODE" in mark.name]
    others = {mark.name for mark, _, _ in marks if "UNICODE" not in mark.name}
    if len(texts) != 1 or others - {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "STOP"}:
        raise BadRow("hidden tests that are no pickled text")
    return _tests(texts[0])
