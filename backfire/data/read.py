"""Reads CSV, TSV, JSON, JSONL and Parquet record by record, and says which line is wrong and why.

Our own, because a loader that guesses takes broken files without a word: a stray quote swallows
rows, a key given twice loses one value, a cut-off archive looks like a short one.
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
from backfire.data.read_json import Reject, kind_of, strings, unusable, values, values_by_line
from backfire.data.read_table import table_rows
from backfire.errors import UserError

Record = dict[str, Any]
OnBadRow = Literal["fail", "skip"]

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
# First bytes that contradict a name which promises text.
MAGIC = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack or export it first",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"ARRO": "an Arrow file: save it as Parquet",
    b"BZh": "a bzip2 file: unpack it first, or pack it by gzip",
    b"\xfd7zX": "an xz file: unpack it first, or pack it by gzip",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: unpack it first, or pack it by gzip",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


UNLABELED = "it has no label"
NO_ANSWER = "the answer is empty"
NO_TEXT = "the text is empty"
_SKIP = "; `on_bad_row: skip` leaves such rows out and counts them"


class BadRowError(Exception):
    """Why one record cannot be used; caught where the file and the line are known."""


class NotLearnedError(Exception):
    """Why a sound record makes no row, as it ends "12 records ..."."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used: where it begins (in Parquet, its number) and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        # The reason may quote the file, and goes to a terminal.
        return f"{self.file}, line {self.line}: {printable(self.reason)}"


@dataclass
class LeftOut:
    """What of the data becomes no row, or no part of one.

    Of bad records the first is an error (`fail`), or all are collected (`skip`).
    """

    on_bad_row: OnBadRow = "fail"
    rejected: list[Rejected] = field(default_factory=list)
    records: Counter[str] = field(default_factory=Counter)
    """What became of sound records that make no row of their own -> how many."""
    turns: Counter[str] = field(default_factory=Counter)
    """The same of the turns of conversations."""
    columns: Counter[str] = field(default_factory=Counter)
    """Column that reaches neither prompt nor answer -> in how many rows it says anything."""

    def bad(self, file: str | Path, line: int, reason: str) -> None:
        bad = Rejected(str(file), line, reason)
        if self.on_bad_row == "fail":
            raise UserError(
                f"{bad}{_SKIP if reason.startswith((UNLABELED, NO_ANSWER, NO_TEXT)) else ''}."
            )
        self.rejected.append(bad)

    def lost(self) -> list[str]:
        """Which records make no row, a sentence each."""
        said = [f"{_some(n, 'record')} {what}." for n, what in _ordered(self.records)]
        if self.rejected:
            count, first = _some(len(self.rejected), "bad row"), self.rejected[0]
            said.insert(0, f"{count} left out, the first: {first}.")
        return said

    def notes(self) -> list[str]:
        """The same, and which turns and columns are not learned from."""
        said = self.lost() + [f"{_some(n, 'turn')} {what}." for n, what in _ordered(self.turns)]
        if self.columns:
            names = listed([name for _, name in _ordered(self.columns)])
            which = f"columns {names} reach" if len(self.columns) > 1 else f"column {names} reaches"
            said.append(
                f"The {printable(which)} neither the prompt nor the answer; to use one, say which "
                "is which by `columns`."
            )
        return said


def printable(text: str) -> str:
    """The text without what would not show, or would do something, in a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _ordered(counts: Counter[str]) -> list[tuple[int, str]]:
    return sorted(((count, what) for what, count in counts.items()), key=lambda c: (-c[0], c[1]))


def records(
    path: str | Path, left: LeftOut | None = None, *, header: bool = True
) -> Iterator[tuple[int, Record]]:
    """Each record of the file with the line it begins on; what cannot be read goes to `left`.

    Without `left` the first bad record is an error. With `header=False` the
    columns of a table are called "0", "1", ..., and a header is passed over if there is one.

    Raises:
        UserError: there is no such file, it has no rows or no known format, or (with `fail`) any
            record is bad.
    """
    path, left = Path(path), left or LeftOut()
    found, before = False, len(left.rejected)
    try:
        for item in _read(path, partial(left.bad, path), header):
            found = True
            yield item
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not found and len(left.rejected) == before:
        raise UserError(f"{path} holds no rows.")


def _read(path: Path, reject: Reject, header: bool) -> Iterator[tuple[int, Record]]:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file.")
    if not path.is_file():
        raise UserError(f"No such file: {path}.")
    with path.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        packed = start.startswith(b"\x1f\x8b")
        suffix = _suffix(path, start, packed)
        if suffix == ".parquet":
            yield from _parquet(path, reject)
            return
        # The bytes decide, not the name: downloads lose or gain a .gz on their way.
        lines = _lines(gzip.GzipFile(fileobj=raw) if packed else raw, reject)
        for line, value in _parse(suffix, lines, reject, header):
            if isinstance(value, dict):
                yield line, value
            else:
                reject(line, f"{kind_of(value)} where a record (an object) should be")


def _parse(
    suffix: str, lines: Iterator[bytes], reject: Reject, header: bool
) -> Iterator[tuple[int, Any]]:
    if suffix == ".json":
        return values(lines, reject)
    if suffix in (".jsonl", ".ndjson"):
        return values_by_line(lines, reject)
    return table_rows(lines, reject, tabs=suffix == ".tsv", header=header)


def _suffix(path: Path, start: bytes, packed: bool) -> str:
    """What names the format; an error if the first bytes contradict it."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: no known data format ({known}; all but Parquet also with .gz).")
    if name.endswith(".gz") and start and not packed:
        raise UserError(f"{path} is not a gzip file, though its name says so.")
    if suffix == ".parquet":
        if start != b"PAR1":
            raise UserError(f"{path} is not a Parquet file, though its name says so.")
        return suffix
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {what}.")
    return suffix


def _lines(stream: Iterable[bytes], reject: Reject) -> Iterator[bytes]:
    """The lines, without a byte-order mark; a damaged archive ends them with one rejection."""
    line = 0
    try:
        for line, raw in enumerate(stream, 1):
            yield raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        reject(line + 1, "the compressed file is damaged or cut off from here on")


def _parquet(path: Path, reject: Reject) -> Iterator[tuple[int, Record]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                reject(1, "a column appears twice")
                return
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    problem = unusable(strings(record))
                    if problem:
                        reject(number, problem)
                    else:
                        yield number, record
    except UserError:
        raise
    except Exception as error:  # damaged files fail in more ways than pyarrow documents
        reason = str(error).partition("\n")[0]
        reject(number + 1, f"the Parquet file is damaged from here on ({reason})")
