"""The answers of an evaluation, kept as they come, so that one that was cut off goes on."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from klear_jax import hosts
from klear_jax.errors import InputError

FLUSH_S = 60
# A problem's prompt_id, whether the sample is a greedy one, and its number.
Key = tuple[int, bool, int]
Row = dict[str, Any]


def key_of(row: Mapping[str, Any]) -> Key:
    return row["prompt_id"], row["greedy"], row["sample"]


class Answers:
    """A file of JSON lines, an answer each, that appears when all are there. Until then they
    lie in FILE.parts/, where each process puts a new file every FLUSH_S: object stores cannot
    append. A context manager: leaving it, however, keeps what has come.

    Attributes:
      found: the answers of earlier starts, by their keys.
    """

    def __init__(self, path: epath.PathLike, made_with: str):
        """
        Args:
          path: of the file; of several processes, on storage that all share.
          made_with: tells these answers from others.

        Raises:
          InputError: there are others.
        """
        self.path = epath.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._made_with = made_with
        self._parts = self.path.with_name(f"{self.path.name}.parts")
        self._rows: list[Row] = []  # Not written yet.
        self._flushed = time.monotonic()
        parts = sorted(self._parts.glob("*.jsonl")) if self._parts.exists() else []
        numbers = [0, *(int(part.stem.split("_")[1]) for part in parts)]
        # The same on all: none writes before all have looked.
        self._number = max(hosts.gather(max(numbers)))
        files = parts + [self.path] * self.path.exists()
        self.found = {key_of(row): row for file in files for row in self._read(file)}

    def _read(self, file: epath.Path) -> list[Row]:
        rows = []
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    rows.append(json.loads(line))
                    same = rows[-1]["made_with"] == self._made_with
                    key_of(rows[-1])
                except (ValueError, TypeError, KeyError):
                    same = False
                if not same:
                    raise InputError(
                        f"{file} line {number} is not of this model, data and evaluation: "
                        "give another file"
                    )
        return rows

    def add(self, row: Row) -> None:
        self._rows.append(row | {"made_with": self._made_with})
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._rows:
            return
        self._parts.mkdir(parents=True, exist_ok=True)
        self._number += 1
        _put(self._parts / f"{hosts.index()}_{self._number:06d}.jsonl", self._rows)
        self._rows = []

    def finish(self, rows: list[Row]) -> None:
        """Writes the file: all answers, in their order. All processes call it."""
        if hosts.first():
            _put(self.path, [row | {"made_with": self._made_with} for row in rows])
        hosts.gather(None)
        self._rows = []
        if hosts.first() and self._parts.exists():
            self._parts.rmtree()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.flush()


def _put(path: epath.Path, rows: list[Row]) -> None:
    """The file, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.writing")
    with unfinished.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    unfinished.replace(path)


def finite(x: float) -> float | None:
    """JSON has no nan."""
    return float(x) if math.isfinite(x) else None
