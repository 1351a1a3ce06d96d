"""Examples from a TFDS data set, JSON lines or parquet, all checked as they are read.

Rows are ours (prompt or problem; answer, response), or those of RL data sets as the authors
publish them, KlearReasoner-MathSub-30K and CodeSub-15K: data_source, prompt,
reward_model.ground_truth (FACTS (h)).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet
import tensorflow_datasets as tfds
from etils import epath

from klear_jax.errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a data set.

    Attributes:
      origin: where it stands, for messages: file and line, or data set, split and row.
      prompt_id: int32, unique in the data set: a part of the key of all randomness.
      messages: {role, content} dicts; the prompt, before the chat template.
      answer: what the response must reach: text, a list of texts of which any is right, or
        an object, as tests are; None where the row has none.
      response: a demonstration; None where the row has none.
      source: what the row says of its origin, which decides on its reward; '' for nothing.
    """

    origin: str
    prompt_id: int
    messages: tuple[Mapping[str, str], ...]
    answer: Any
    response: str | None
    source: str = ""

    @property
    def problem(self) -> str:
        """What the last message says."""
        return self.messages[-1]["content"]


def read_examples(path: epath.PathLike, split: str = "") -> list[Example]:
    """Reads all examples, in the order of the data set.

    Args:
      path: the folder of one version of a TFDS data set (array_record), or a file: parquet
        if its name ends in .parquet, else JSON lines. Keys: prompt (text, or a list of
        {role, content}) or problem (text); answer, or reward_model with a ground_truth,
        response or both; data_source. Other keys are ignored. Several of them, with
        commas between, are read one after the other, and their prompts numbered anew.
      split: of the TFDS data set; a file has none.

    Raises:
      InputError: missing or broken files, an unknown split, no examples, or a bad row,
        named by file and line.
    """
    paths = str(path).split(",")
    if len(paths) > 1:
        rows = [row for part in paths for row in read_examples(part, split)]
        return [dataclasses.replace(row, prompt_id=i) for i, row in enumerate(rows)]
    path = epath.Path(path)
    if path.is_dir():
        examples = _read_tfds(path, split)
    elif path.exists():
        if split:
            raise InputError(f"{path} is a file without splits, so no split {split!r}")
        read = _read_parquet if path.suffix == ".parquet" else _read_json_lines
        examples = read(path)
    else:
        raise InputError(f"no data set at {path}")
    if not examples:
        raise InputError(f"{path} holds no examples")
    return examples


def _read_tfds(path: epath.Path, split: str) -> list[Example]:
    try:
        source = tfds.builder_from_directory(path).as_data_source(split)
        rows = source.__getitems__(range(len(source)))
    except Exception as error:  # TFDS, protobuf and array_record raise a class each.
        raise InputError(f"{path}, split {split!r}, cannot be read: {error}") from error
    examples = []
    for i, row in enumerate(rows):
        origin = f"{path} {split} row {i}"
        # Rows of a truncated file may come back with None for all.
        if row.get("prompt_id") is None:
            raise InputError(f"{origin} has no prompt_id: is the file truncated?")
        row = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
        examples.append(_example(row, origin, prompt_id=int(row["prompt_id"])))
    return examples


def _read_json_lines(path: epath.Path) -> list[Example]:
    """Examples of a file; a line's number is its prompt_id, so that twins differ."""
    examples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{path} line {number}"
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{origin} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{origin} is not a JSON object")
            examples.append(_example(row, origin, prompt_id=number))
    return examples


def _read_parquet(path: epath.Path) -> list[Example]:
    """Examples of a file; a row's number from 1 is its prompt_id, as in JSON lines."""
    data = pyarrow.BufferReader(path.read_bytes())
    try:
        rows = pyarrow.parquet.read_table(data).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is no parquet file: {error}") from error
    return [
        _example(row, f"{path} row {number}", prompt_id=number)
        for number, row in enumerate(rows, 1)
    ]


def _example(row: Mapping[str, Any], origin: str, *, prompt_id: int) -> Example:
    prompt = row.get("prompt", row.get("problem"))
    messages = [{"role": "user", "content": prompt}] if _is_text(prompt) else prompt
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{origin}: prompt or problem must be text or messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            _is_text(message.get(key)) for key in ("role", "content")
        ):
            raise InputError(f"{origin}: a message is not a role and a content in text")
    answer, model = row.get("answer"), row.get("reward_model")
    if answer is None and isinstance(model, dict):
        answer = model.get("ground_truth")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    response, source = row.get("response"), row.get("data_source") or ""
    if answer is not None and not _is_answer(answer):
        raise InputError(
            f"{origin}: answer must be text that is not empty, a list of such, or an "
            "object"
        )
    if response is not None and not _is_text(response):
        raise InputError(f"{origin}: response must be text that is not empty")
    if not isinstance(source, str):
        raise InputError(f"{origin}: data_source must be text, not {source!r}")
    if answer is None and response is None:
        raise InputError(f"{origin} has neither answer nor response")
    return Example(origin, prompt_id, tuple(messages), answer, response, source)


def _is_answer(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_text, value))
    if isinstance(value, dict):
        return not SURROGATE.search(json.dumps(value, ensure_ascii=False))
    return _is_text(value)


def _is_text(value: Any) -> bool:
    """Whether value is text that UTF-8 can hold (no half of a surrogate pair)."""
    return isinstance(value, str) and value != "" and not SURROGATE.search(value)
