"""Examples from a TFDS data set or a JSON lines file, all checked as they are read."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

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
      answer: what the response must reach; None where the row has none.
      response: a demonstration; None where the row has none.
    """

    origin: str
    prompt_id: int
    messages: tuple[Mapping[str, str], ...]
    answer: str | None
    response: str | None

    @property
    def problem(self) -> str:
        """What the last message says."""
        return self.messages[-1]["content"]


def read_examples(path: epath.PathLike, split: str = "") -> list[Example]:
    """Reads all examples, in the order of the data set.

    Args:
      path: the folder of one version of a TFDS data set (array_record), or a JSON lines
        file with the keys prompt (text, or a list of {role, content}) or problem (text),
        and answer, response or both. Other keys are ignored.
      split: of the TFDS data set; a JSON lines file has none.

    Raises:
      InputError: missing or broken files, an unknown split, no examples, or a bad row,
        named by file and line.
    """
    path = epath.Path(path)
    if path.is_dir():
        examples = _read_tfds(path, split)
    elif path.exists():
        if split:
            raise InputError(f"{path} is a file without splits, so no split {split!r}")
        examples = _read_json_lines(path)
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
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    example = Example(origin, prompt_id, tuple(messages), answer, row.get("response"))
    for key in ("answer", "response"):
        value = getattr(example, key)
        if value is not None and not _is_text(value):
            raise InputError(f"{origin}: {key} must be text that is not empty")
    if example.answer is None and example.response is None:
        raise InputError(f"{origin} has neither answer nor response")
    return example


def _is_text(value: Any) -> bool:
    """Whether value is text that UTF-8 can hold (no half of a surrogate pair)."""
    return isinstance(value, str) and value != "" and not SURROGATE.search(value)
