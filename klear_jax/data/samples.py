"""One part of a file -> its clean samples, in a file of their own, and what was left out."""

import dataclasses
import functools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from klear_jax import tokens
from klear_jax.data import cleaning, files, rows
from klear_jax.data.benchmarks import in_own_words
from klear_jax.errors import InputError
from klear_jax.rewards import code, routing
from klear_jax.rewards.routing import RewardConfig

# Of each reason, in the report of a part.
EXAMPLES = 3
NAMED = 20
EXCERPT = 200  # Characters.

SCHEMA = pyarrow.schema(
    {
        "origin": pyarrow.string(),
        "messages": pyarrow.string(),
        "response": pyarrow.string(),
        "answer": pyarrow.string(),
        "answer_is_json": pyarrow.bool_(),
        "data_source": pyarrow.string(),
        "tokens": pyarrow.list_(pyarrow.int32()),
        "prompt_tokens": pyarrow.int32(),
        "num_tokens": pyarrow.int32(),
        "num_bytes": pyarrow.int64(),
        "prompt_hash": pyarrow.int64(),
        "sample_hash": pyarrow.int64(),
        "answer_hash": pyarrow.int64(),
    }
)


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """What a row must be, looked at by itself."""

    think: str  # 'required', or 'any'.
    max_prompt_tokens: int  # 0: any number.
    max_tokens: int  # Of prompt and response; 0: any number.
    min_tests: int  # Of an answer that is tests; 0: any number.
    benchmarks: tuple[str, ...]
    ngram: int
    allowed: tuple[str, ...]
    max_bad_share: float

    def __post_init__(self):
        if self.think not in ("required", "any"):
            raise InputError(f"think must be 'required' or 'any', not {self.think!r}")
        if self.ngram < cleaning.SHORTEST_PASSAGE:
            raise InputError(f"ngram must be at least {cleaning.SHORTEST_PASSAGE}")
        for key in ("max_prompt_tokens", "max_tokens", "min_tests"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} must not be negative; 0 is no limit")
        if not 0 <= self.max_bad_share <= 1:
            raise InputError("max_bad_share must be from 0 to 1")


@dataclasses.dataclass(frozen=True)
class PartReport:
    """What became of the rows of a part.

    Attributes:
      source: the source's name in the config.
      rows: how many it had.
      bad: reason -> rows that cannot be read.
      dropped: reason -> rows that are not wanted.
      named: origin and fault of the first bad rows.
      examples: the first dropped rows of each reason: origin, detail, excerpt.
    """

    source: str
    rows: int
    bad: dict[str, int]
    dropped: dict[str, int]
    named: list[str]
    examples: dict[str, list[dict[str, str]]]


class Unwanted(Exception):
    """A good row that the data set shall not have: why, and what is particular about it."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


# A worker process loads each once.
load_tokenizer = functools.cache(tokens.load)


@functools.cache
def load_benchmarks(
    patterns: tuple[str, ...], ngram: int, allowed: tuple[str, ...]
) -> cleaning.Benchmarks:
    """The problems of all benchmark files: JSON lines or parquet with a prompt, as
    `rows.SHAPES["any"]` says, or LiveCodeBench's rows."""
    problems: list[tuple[str, str]] = []
    for path in (
        path for pattern in patterns for path in files.find("clean.benchmarks", pattern)
    ):
        before = len(problems)
        for origin, _, messages in read_prompts(path):
            problems.append((origin, messages[-1]["content"]))
        if len(problems) == before:
            raise InputError(f"the benchmark file {path} holds no problem")
    return cleaning.Benchmarks(problems, n=ngram, allowed=allowed)


def read_prompts(
    path: str,
) -> Iterator[tuple[str, Mapping[str, Any], list[dict[str, str]]]]:
    """Origin, row and messages of each row of a file; an InputError for one that has none."""
    fields = rows.SHAPES["any"]
    for part in files.parts(path, 1 << 24):
        for origin, _, row in part.rows():
            try:
                row = in_own_words(rows.from_json(row))
                messages, _ = rows.read_prompt(row, fields)
            except rows.BadRow as error:
                raise InputError(f"{origin}: {error}") from None
            yield origin, row, messages


def clean_part(
    part: files.Part,
    output: pathlib.Path,
    *,
    kind: str,
    source: str,
    fields: rows.Fields,
    config: CleanConfig,
    tokenizer: str,
    rewards: RewardConfig | None,
) -> None:
    """Writes the part's clean samples to output.parquet, then the report to output.json.

    Args:
      part: the rows.
      output: path without its end.
      kind: 'sft': rows need responses; 'rl': answers.
      source: of the part.
      fields: of its rows.
      config: what is clean.
      tokenizer: its folder.
      rewards: what an answer must suit; None: anything.
    """
    benchmarks = load_benchmarks(config.benchmarks, config.ngram, config.allowed)
    samples: list[dict[str, Any]] = []
    report = PartReport(source, 0, Counter(), Counter(), [], {})
    num_rows = 0
    for origin, number, row in part.rows():
        num_rows += 1
        try:
            example = rows.to_example(row, fields, origin=origin, prompt_id=number)
            check_example(example, kind, rewards)
            samples.append(
                _sample(example, kind, config, benchmarks, load_tokenizer(tokenizer))
            )
        except rows.BadRow as error:
            report.bad[error.reason] += 1
            if len(report.named) < NAMED:
                report.named.append(f"{origin}: {str(error)[:EXCERPT]}")
        except Unwanted as error:
            report.dropped[error.reason] += 1
            seen = report.examples.setdefault(error.reason, [])
            if len(seen) < EXAMPLES:
                text = example.problem[:EXCERPT]
                seen.append({"origin": origin, "detail": error.detail, "prompt": text})
    report = dataclasses.replace(report, rows=num_rows)
    table = pyarrow.Table.from_pylist(samples, SCHEMA)
    put(
        output.with_suffix(".parquet"),
        lambda path: pyarrow.parquet.write_table(table, path, compression="zstd"),
    )
    text = json.dumps(vars(report))
    put(output.with_suffix(".json"), lambda path: path.write_text(text))


def put(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Calls write so that the file is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.writing")
    write(unfinished)
    os.replace(unfinished, path)


def _sample(
    example: rows.Example,
    kind: str,
    config: CleanConfig,
    benchmarks: cleaning.Benchmarks,
    tokenizer: tokens.Tokenizer,
) -> dict[str, Any]:
    """The example as a row of SCHEMA; BadRow and Unwanted say why not."""
    _check_tests(example, config.min_tests)
    said = (example.response or "", *(m["content"] for m in example.messages))
    for marker in sorted(tokenizer.markers):
        if any(marker in text for text in said):
            raise Unwanted("control token in the text", repr(marker))
    for message in example.messages:
        if message["role"] != "system" and (hit := benchmarks.find(message["content"])):
            passage, problem = hit
            raise Unwanted("benchmark passage", f"{passage!r} of {problem}")
    response = ""
    if kind == "sft":
        response = example.response or ""
        fault = cleaning.think_fault(response)
        if fault and config.think == "required":
            raise Unwanted(fault)
    try:
        prompt_ids, ids = tokenize(example.messages, response, tokenizer)
    except InputError as error:  # A role that the chat template does not know.
        raise rows.BadRow(
            "the chat template refuses the messages", str(error)
        ) from None
    if 0 < config.max_prompt_tokens < len(prompt_ids):
        raise Unwanted("prompt too long", f"{len(prompt_ids)} tokens")
    if kind == "sft" and 0 < config.max_tokens < len(prompt_ids) + len(ids):
        raise Unwanted("too long", f"{len(prompt_ids) + len(ids)} tokens")
    messages = json.dumps(example.messages, ensure_ascii=False)
    as_json = isinstance(example.answer, list | dict)
    answer = example.answer or ""
    if as_json:
        answer = json.dumps(answer, ensure_ascii=False)
    prompt_hash = cleaning.prompt_hash(example.messages)
    ids = prompt_ids + ids if kind == "sft" else []
    return {
        "origin": example.origin,
        "messages": messages,
        "response": response,
        "answer": answer,
        "answer_is_json": as_json,
        "data_source": example.source,
        "tokens": np.array(ids, np.int32),
        "prompt_tokens": len(prompt_ids),
        "num_tokens": len(ids) or len(prompt_ids),
        "num_bytes": len(messages) + len(response) + len(answer) + 3 * len(ids),
        "prompt_hash": prompt_hash,
        "sample_hash": cleaning.text_hash(f"{prompt_hash} {response}"),
        "answer_hash": cleaning.text_hash(answer),
    }


def tokenize(
    messages: Sequence[Mapping[str, str]], response: str, tokenizer: tokens.Tokenizer
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and those that are learnt: of the response and its end."""
    ids = [*tokenizer.encode(response), tokenizer.stop_ids[0]]
    return tokenizer.prompt(messages), ids


def check_example(
    example: rows.Example, kind: str, rewards: RewardConfig | None
) -> None:
    """Raises a BadRow for an example that has not what its kind needs, or an answer that no
    reward can compare with."""
    if kind == "sft" and example.response is None:
        raise rows.BadRow("no response to learn from")
    if kind == "rl" and example.answer is None:
        raise rows.BadRow("no answer to compare with")
    if rewards is None or example.answer is None:
        return
    try:
        rewards.kind_of(example.source)
    except KeyError:
        raise rows.BadRow(
            "no reward for its data_source", repr(example.source)
        ) from None
    try:
        routing.ground_truth(rewards, example.source, example.answer, seed="")
    except InputError as error:
        raise rows.BadRow("the answer is no tests", str(error)) from None


def _check_tests(example: rows.Example, min_tests: int) -> None:
    if not min_tests:
        return
    try:
        count = len(code.parse(example.answer).cases)
    except InputError as error:
        raise rows.BadRow("the answer is no tests", str(error)) from None
    if count < min_tests:
        raise Unwanted("too few tests", f"{count} of {min_tests}")
