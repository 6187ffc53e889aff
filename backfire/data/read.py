"""Reads CSV, TSV, JSON, JSONL and Parquet record by record, and reports bad lines with the reason.

Our own, since lenient loaders silently accept broken files: a stray quote swallows rows, a
duplicate key loses a value, a truncated archive looks like a short one.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from backfire.data.columns import listed
from backfire.data.read_json import (
    Reject,
    UnreadableError,
    kind_of,
    strings,
    unusable,
    values,
    values_by_line,
)
from backfire.data.read_table import table_rows
from backfire.errors import UserError, no_file

Record = dict[str, Any]
OnBadRow = Literal["fail", "skip"]

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
# First bytes that contradict the file name of a text format.
MAGIC = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack or export it first",
    b"PAR1": "a Parquet file: rename it to end in .parquet",
    b"ARRO": "an Arrow file: save it as Parquet",
    b"BZh": "a bzip2 file: decompress it, or use gzip",
    b"\xfd7zX": "an xz file: decompress it, or use gzip",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: decompress it, or use gzip",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


UNLABELED = "it has no label"
NO_ANSWER = "the answer is empty"
NO_TEXT = "the text is empty"
_SKIP = "; `on_bad_row: skip` leaves such rows out and counts them"


class BadRowError(Exception):
    """Why a record is invalid; caught where the file and the line are known."""


class NotLearnedError(Exception):
    """Why a valid record is not used; completes the sentence "12 records ..."."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An invalid record: its first line (in Parquet, its number) and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        # The reason may quote the file and is printed to a terminal.
        return f"{self.file}, line {self.line}: {printable(self.reason)}"


@dataclass
class LeftOut:
    """Counts the data that is left out of the rows.

    The first bad record is an error (`fail`), or all are collected (`skip`).
    """

    on_bad_row: OnBadRow = "fail"
    rejected: list[Rejected] = field(default_factory=list)
    records: Counter[str] = field(default_factory=Counter)
    """Why valid records give no row -> their number."""
    turns: Counter[str] = field(default_factory=Counter)
    """Why turns of conversations are not learned -> their number."""
    columns: Counter[str] = field(default_factory=Counter)
    """Column that reaches neither prompt nor answer -> number of rows where it is not empty."""

    def bad(self, file: str | Path, line: int, reason: str) -> None:
        """Collect a bad record.

        Raises:
            UserError: bad records are errors (`fail`).
        """
        bad = Rejected(str(file), line, reason)
        if self.on_bad_row == "fail":
            raise UserError(
                f"{bad}{_SKIP if reason.startswith((UNLABELED, NO_ANSWER, NO_TEXT)) else ''}."
            )
        self.rejected.append(bad)

    def omissions(self) -> list[str]:
        """One sentence for each reason why records give no row."""
        sentences = [f"{_some(n, 'record')} {what}." for n, what in _ordered(self.records)]
        if self.rejected:
            count, first = _some(len(self.rejected), "bad row"), self.rejected[0]
            sentences.insert(0, f"{count} left out, the first: {first}.")
        return sentences

    def notes(self) -> list[str]:
        """The same, and one sentence each for turns and columns that are not learned."""
        sentences = self.omissions()
        sentences += [f"{_some(n, 'turn')} {what}." for n, what in _ordered(self.turns)]
        if self.columns:
            names = listed([name for _, name in _ordered(self.columns)])
            which = f"columns {names} reach" if len(self.columns) > 1 else f"column {names} reaches"
            sentences.append(
                f"The {printable(which)} neither the prompt nor the answer; to use one, assign it "
                "by data.columns."
            )
        return sentences


def printable(text: str) -> str:
    """The text with characters that are invisible or control a terminal replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _ordered(counts: Counter[str]) -> list[tuple[int, str]]:
    return sorted(((count, what) for what, count in counts.items()), key=lambda c: (-c[0], c[1]))


def records(
    path: str | Path, left: LeftOut | None = None, *, header: bool = True
) -> Iterator[tuple[int, Record]]:
    """Each record of the file with its first line; bad records go to `left`.

    Without `left` the first bad record is an error. Damage after which the rest cannot be read is
    always one, so that a damaged file is never read as a short one. With `header=False` the columns
    of a table are named "0", "1", ..., and a header is skipped if there is one.

    Raises:
        UserError: there is no such file, it has no rows or an unknown format, it is damaged, or
            (with `fail`) a record is bad.
    """
    path, left = Path(path), left or LeftOut()
    is_empty, before = True, len(left.rejected)
    try:
        for item in _read(path, partial(left.bad, path), header):
            is_empty = False
            yield item
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnreadableError as error:
        raise UserError(f"{Rejected(str(path), error.line, str(error))}.") from None
    if is_empty and len(left.rejected) == before:
        raise UserError(f"{path} has no rows.")


def _read(path: Path, reject: Reject, header: bool) -> Iterator[tuple[int, Record]]:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file.")
    if not path.is_file():
        raise no_file(path)
    with path.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        packed = start.startswith(b"\x1f\x8b")
        suffix = _suffix(path, start, packed)
        if suffix == ".parquet":
            yield from _parquet(path, reject)
            return
        # The bytes decide, not the name: downloads may lose or gain a .gz.
        lines = _lines(gzip.GzipFile(fileobj=raw) if packed else raw)
        for line, value in _parse(suffix, lines, reject, header):
            if isinstance(value, dict):
                yield line, value
            else:
                reject(line, f"{kind_of(value)} instead of a record (an object)")


def _parse(
    suffix: str, lines: Iterator[bytes], reject: Reject, header: bool
) -> Iterator[tuple[int, Any]]:
    if suffix == ".json":
        return values(lines, reject)
    if suffix in (".jsonl", ".ndjson"):
        return values_by_line(lines, reject)
    return table_rows(lines, reject, tabs=suffix == ".tsv", header=header)


def _suffix(path: Path, start: bytes, packed: bool) -> str:
    """The suffix that names the format.

    Raises:
        UserError: it is unknown, or the first bytes contradict it.
    """
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        formats = ", ".join(FORMATS)
        raise UserError(
            f"{path}: unknown data format; use one of {formats} (all but Parquet also with .gz)."
        )
    if name.endswith(".gz") and start and not packed:
        raise UserError(f"{path} is not a gzip file, despite its name.")
    if suffix == ".parquet":
        if start != b"PAR1":
            raise UserError(f"{path} is not a Parquet file, despite its name.")
        return suffix
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {what}.")
    return suffix


def _lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without a byte-order mark.

    Raises:
        UnreadableError: the archive is damaged.
    """
    line = 0
    try:
        for line, raw in enumerate(stream, 1):
            yield raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        reason = "the compressed file is damaged or truncated from here on"
        raise UnreadableError(line + 1, reason) from None


def _parquet(path: Path, reject: Reject) -> Iterator[tuple[int, Record]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UnreadableError(1, "duplicate column")
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    problem = unusable(strings(record))
                    if problem:
                        reject(number, problem)
                    else:
                        yield number, record
    except (UserError, UnreadableError):
        raise
    except Exception as error:  # damaged files fail in more ways than pyarrow documents
        reason = str(error).partition("\n")[0]
        damage = f"the Parquet file is damaged from here on ({reason})"
        raise UnreadableError(number + 1, damage) from None
