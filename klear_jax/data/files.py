"""Files of rows, read as a stream in parts of bounded size: JSON lines (plain, gzip, zstd)
and parquet, by the end of their names."""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from klear_jax.errors import InputError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
LONGEST_LINE = 1 << 26  # Bytes.
PARQUET_ROWS = 256  # Decoded at once.


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a file, not yet parsed: quick to make and to send to another process.

    Attributes:
      path: the file.
      first: number of the first row, from 1: a line's number, or a row's in parquet.
      lines: of JSON; None where `table` has the rows.
      table: of parquet.
      num_read: bytes of the file since the part before.
    """

    path: str
    first: int
    lines: list[bytes] | None
    table: pyarrow.Table | None
    num_read: int

    def rows(self) -> Iterator[tuple[str, int, bytes | Mapping[str, Any]]]:
        """Origin, number and content of each row, a line of JSON or what parquet holds;
        empty lines are no rows."""
        if self.table is not None:
            for number, row in enumerate(self.table.to_pylist(), self.first):
                yield f"{self.path} row {number}", number, row
            return
        for number, line in enumerate(self.lines, self.first):
            if line and not line.isspace():
                yield f"{self.path} line {number}", number, line

    def head(self, num_rows: int | None) -> "Part":
        """Its first rows (lines, of JSON); None: all."""
        if self.table is not None:
            return dataclasses.replace(self, table=self.table[:num_rows])
        return dataclasses.replace(self, lines=self.lines[:num_rows])

    def __len__(self) -> int:
        return len(self.lines) if self.table is None else len(self.table)


def find(patterns: str) -> list[str]:
    """The files that patterns, with commas between, stand for, sorted within each."""
    found = []
    for pattern in map(str.strip, patterns.split(",")):
        paths = [pattern] if "://" in pattern else sorted(glob.glob(pattern))
        paths = [path for path in paths if epath.Path(path).is_file()]
        if not paths:
            raise InputError(f"no file at {pattern!r}")
        found += paths
    return found


def file_size(path: str) -> int:
    """Bytes."""
    return epath.Path(path).stat().length


def fingerprint(path: str) -> str:
    """Of a file's size, beginning and end: quick, and the same for a copy."""
    size = file_size(path)
    with epath.Path(path).open("rb") as file:
        digest = hashlib.blake2b(file.read(1 << 16), digest_size=8)
        file.seek(max(0, size - (1 << 16)))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"


def parts(path: str, part_bytes: int) -> Iterator[Part]:
    """The file in parts of about part_bytes, always cut at the same rows.

    Raises:
      InputError: the file is missing, cut off or not what its name says; after the parts
        before that.
    """
    read = _parquet_parts if path.endswith(".parquet") else _line_parts
    try:
        yield from read(path, part_bytes)
    except (OSError, pyarrow.ArrowException, EOFError) as error:
        kind = "parquet" if path.endswith(".parquet") else "JSON lines"
        raise InputError(
            f"{path} cannot be read to its end as {kind}: {error}"
        ) from error


def _line_parts(path: str, part_bytes: int) -> Iterator[Part]:
    codec = COMPRESSED.get(os.path.splitext(path)[1])
    with epath.Path(path).open("rb") as file:
        stream = pyarrow.CompressedInputStream(file, codec) if codec else file
        first, lines, size, start = 1, [], 0, 0
        for line in _lines(stream, path):
            lines.append(line)
            size += len(line)
            if size >= part_bytes:
                yield Part(path, first, lines, None, file.tell() - start)
                first, lines, size, start = first + len(lines), [], 0, file.tell()
        if lines:
            yield Part(path, first, lines, None, file.tell() - start)


def _lines(stream: Any, path: str) -> Iterator[bytes]:
    """Lines without their ends, read a MiB at a time."""
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n") if b"\n" in block else [rest + block]
        yield from lines
        if len(rest) > LONGEST_LINE:
            raise InputError(f"{path} has a line of over {LONGEST_LINE} bytes")
    if rest:
        yield rest


def _parquet_parts(path: str, part_bytes: int) -> Iterator[Part]:
    with (
        epath.Path(path).open("rb") as source,
        pyarrow.parquet.ParquetFile(source, pre_buffer=False) as file,
    ):
        size_on_disk, num_rows = file_size(path), file.metadata.num_rows
        first, batches, size, seen = 1, [], 0, 0
        for batch in file.iter_batches(PARQUET_ROWS):
            batches.append(batch)
            size += batch.nbytes
            seen += batch.num_rows
            if size >= part_bytes or seen == num_rows:
                table = pyarrow.Table.from_batches(batches)
                read = size_on_disk * len(table) // num_rows
                yield Part(path, first, None, table, read)
                first, batches, size = seen + 1, [], 0
