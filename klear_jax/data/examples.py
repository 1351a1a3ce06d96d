"""Examples from a TFDS data set, JSON lines or parquet, all checked as they are read."""

import dataclasses
import json
from typing import Any

from etils import epath

from klear_jax.data import benchmarks, files, rows, shards
from klear_jax.data.rows import Example
from klear_jax.errors import InputError, let_pass


def read_examples(path: epath.PathLike, split: str = "") -> list[Example]:
    """Reads all examples, in the order of the data set.

    Args:
      path: the folder of one version of a TFDS data set (array_record), or a file: parquet
        if its name ends in .parquet, else JSON lines, perhaps .gz or .zst. Rows are as
        `rows.SHAPES["any"]` says, or as `benchmarks.adapt`; other keys are ignored. Several of them, with commas
        between, are read one after the other, and their prompts numbered anew.
      split: of the TFDS data set; a file has none.

    Raises:
      InputError: missing or broken files, an unknown split, no examples, or a bad row,
        named by file and line.
    """
    paths = str(path).split(",")
    if len(paths) > 1:
        found = [example for part in paths for example in read_examples(part, split)]
        return [dataclasses.replace(one, prompt_id=i) for i, one in enumerate(found)]
    path = epath.Path(path)
    if path.is_dir():
        examples = _read_tfds(path, split)
    elif path.exists():
        if split:
            raise InputError(f"{path} is a file without splits, so no split {split!r}")
        examples = [
            _example(row, origin, prompt_id=number)
            for part in files.parts(str(path), 1 << 24)
            for origin, number, row in part.rows()
        ]
    else:
        raise InputError(
            f"no data set at {path}: name a file, or a folder that prepare_data made"
        )
    if not examples:
        raise InputError(f"{path} holds no examples")
    return examples


def _read_tfds(path: epath.Path, split: str) -> list[Example]:
    source: Any = shards.read_source(path, split)
    try:
        read = source.__getitems__(range(len(source)))
    except Exception as error:  # TFDS, protobuf and array_record raise a class each.
        let_pass(error)
        raise InputError(f"{path}, split {split!r}, cannot be read: {error}") from error
    examples = []
    for i, row in enumerate(read):
        origin = f"{path} {split} row {i}"
        # Rows of a truncated file may come back with None for all.
        if any(value is None for value in row.values()):
            raise InputError(f"{origin} is not whole: is the file truncated?")
        row = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
        if "messages" in row:  # Made by `prepare`; others are `builders`.
            row["messages"] = json.loads(row["messages"])
            row["answer"] = _answer(row)
        examples.append(_example(row, origin, prompt_id=int(row.get("prompt_id", i))))
    return examples


def _answer(row: dict[str, Any]) -> Any:
    if not row["answer"]:
        return None
    return json.loads(row["answer"]) if row["answer_is_json"] else row["answer"]


def _example(row: Any, origin: str, *, prompt_id: int) -> Example:
    try:
        row = benchmarks.adapt(rows.from_json(row))
        return rows.to_example(
            row, rows.SHAPES["any"], origin=origin, prompt_id=prompt_id
        )
    except rows.BadRow as error:
        raise InputError(f"{origin}: {error}") from error
