"""Files of rows, read as a stream in parts of bounded size: JSON lines (plain, gzip, zstd)
and parquet, by the end of their names."""

import dataclasses
import glob
import hashlib
import itertools
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from klear_jax.errors import InputError, let_pass

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 20  # Bytes that are read at once.
LONGEST_LINE = 1 << 26  # Bytes, and a block.
PARQUET_ROWS = 256  # Decoded at once.


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a file, not yet parsed: quick to make and to send to another process.

    Attributes:
      path: the file.
      first: number of the first row, from 1: a line's number, or a row's in parquet.
      lines: of JSON, empty ones too; none where `table` has the rows.
      table: of parquet.
      num_read: bytes of the file since the part before.
    """

    path: str
    first: int
    lines: list[bytes]
    table: pyarrow.Table | None
    num_read: int

    def rows(self) -> Iterator[tuple[str, int, bytes | Mapping[str, Any]]]:
        """Origin, number and content of each row, a line of JSON or what parquet holds;
        empty lines are no rows."""
        if self.table is not None:
            for number, row in enumerate(_to_rows(self.table), self.first):
                yield f"{self.path} row {number}", number, row
            return
        for number, line in enumerate(self.lines, self.first):
            if not _is_blank(line):
                yield f"{self.path} line {number}", number, line

    def head(self, num_rows: int | None) -> "Part":
        """Its first rows; None: all."""
        if num_rows is None or num_rows >= len(self):
            return self
        if self.table is not None:
            return dataclasses.replace(self, table=self.table[:num_rows])
        rows = itertools.islice(self.rows(), num_rows)
        last = max((number for _, number, _ in rows), default=self.first - 1)
        return dataclasses.replace(self, lines=self.lines[: last + 1 - self.first])

    def __len__(self) -> int:
        if self.table is not None:
            return len(self.table)
        return sum(not _is_blank(line) for line in self.lines)


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()


def _to_rows(table: pyarrow.Table) -> Iterator[Mapping[str, Any] | bytes]:
    """The rows; b"" for one that Python cannot hold, such as a date in the year 30,000."""
    try:
        yield from table.to_pylist()
    except (ValueError, OverflowError, KeyError):  # KeyError: an unknown time zone.
        for i in range(len(table)):
            try:
                [row] = table[i : i + 1].to_pylist()
                yield row
            except (ValueError, OverflowError, KeyError):
                yield b""


def find(key: str, patterns: str) -> list[str]:
    """The files that patterns, with commas between, stand for, sorted within each; they are the
    value of that key of the config."""
    found = []
    for pattern in map(str.strip, patterns.split(",")):
        paths = [pattern] if "://" in pattern else sorted(glob.glob(pattern))
        paths = [path for path in paths if _is_file(path)]
        if not paths:
            raise InputError(f"config.{key} names no file: {pattern!r}")
        for path in paths:
            if not path.isprintable():
                raise InputError(f"the name of the file {path!r} is no printable text")
        found += paths
    return found


def _is_file(path: str) -> bool:
    """To epath, a device is one."""
    return epath.Path(path).is_file() if "://" in path else os.path.isfile(path)


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


def parts(
    path: str, part_bytes: int, columns: Collection[str] | None = None
) -> Iterator[Part]:
    """The file in parts of about part_bytes, always cut at the same rows.

    Args:
      path: of the file.
      part_bytes: roughly, in memory.
      columns: of parquet, those that are read if they are there; None: all.

    Raises:
      InputError: the file is missing, cut off or not what its name says; after the parts
        before that.
    """
    try:
        if path.endswith(".parquet"):
            yield from _parquet_parts(path, part_bytes, columns)
        else:
            yield from _line_parts(path, part_bytes)
    except (OSError, pyarrow.ArrowException, EOFError) as error:
        let_pass(error)
        kind = "parquet" if path.endswith(".parquet") else "JSON lines"
        raise InputError(
            f"{path} cannot be read to its end as {kind}: {error}"
        ) from error


def _line_parts(path: str, part_bytes: int) -> Iterator[Part]:
    codec = COMPRESSED.get(os.path.splitext(path)[1])
    with epath.Path(path).open("rb") as file:
        stream = pyarrow.CompressedInputStream(file, codec) if codec else file
        first, lines, size, start = 1, [], 0, 0
        for line in _lines(stream):
            lines.append(line)
            size += len(line) + 1
            if size >= part_bytes:
                yield Part(path, first, lines, None, file.tell() - start)
                first, lines, size, start = first + len(lines), [], 0, file.tell()
        if lines:
            yield Part(path, first, lines, None, file.tell() - start)


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines without their ends; too long ones are cut off, so that they are no JSON."""
    rest = b""
    while block := stream.read(BLOCK):
        *lines, end = block.split(b"\n")
        if lines:
            yield rest if len(rest) >= LONGEST_LINE else rest + lines[0]
            yield from lines[1:]
            rest = b""
        if len(rest) < LONGEST_LINE:
            rest += end
    if rest:
        yield rest


def _parquet_parts(
    path: str, part_bytes: int, columns: Collection[str] | None
) -> Iterator[Part]:
    with (
        epath.Path(path).open("rb") as source,
        pyarrow.parquet.ParquetFile(source, pre_buffer=False) as file,
    ):
        size_on_disk, num_rows = file_size(path), file.metadata.num_rows
        first, batches, size, seen = 1, [], 0, 0
        there = file.schema_arrow.names
        wanted = [name for name in there if columns is None or name in columns]
        for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
            batches.append(batch)
            size += batch.nbytes
            seen += batch.num_rows
            if size >= part_bytes or seen == num_rows:
                table = pyarrow.Table.from_batches(batches)
                read = size_on_disk * len(table) // max(num_rows, 1)
                yield Part(path, first, [], table, read)
                first, batches, size = seen + 1, [], 0
        if seen != num_rows:
            raise OSError(f"its footer says {num_rows} rows, it holds {seen}")
