"""Writes the rows that are left of a source: the records of its file as they are, in its format."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from backfire.data.hub import Hub
from backfire.data.jsonl import to_record
from backfire.data.read import FORMATS, LeftOut, Record, records
from backfire.errors import UserError
from backfire.scan.source import File, Source, all_records
from backfire.store import unique

_LINES = (".jsonl", ".ndjson")


def check_format(data: str, path: Path) -> None:
    """Ensure that a file of this name can hold the rows of this data: they are not converted.

    Raises:
        UserError: its name says that it has another format.
    """
    source = Path(data).expanduser()
    given = _suffix(source) if source.is_file() else ""
    if given and given not in FORMATS:
        return  # not read either
    fitting = _LINES if given in (*_LINES, "") else (given,)
    packed = path.name.lower().endswith(".gz")
    if _suffix(path) not in fitting or (packed and given == ".parquet"):
        kind = f"Rows are written as they are in {data}" if given else "The output is JSON lines"
        raise UserError(f"{kind}, so --write must end in {fitting[0]} (got {path}).")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def write_rest(source: Source, gone: Sequence[int], path: Path) -> int:
    """Write what is left without the rows at these places, from 0; the file appears when it is
    complete. Returns the number of rows that are left.

    A record that was read as several rows is left out if one of them is.

    Raises:
        UserError: nothing would be left, or the file has changed since it was read.
    """
    is_left = bytearray(max(source.numbers, default=0) + 1)
    for number in source.numbers:
        is_left[number] = True
    for place in gone:
        is_left[source.numbers[place]] = False
    num_rows = sum(is_left[number] for number in source.numbers)
    if not num_rows:
        raise UserError("All rows would be removed; choose fewer by --remove.")
    origin = source.origin
    if isinstance(origin, File):
        origin.check()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{unique()}.tmp")
    try:
        if isinstance(origin, File) and _suffix(origin.path) == ".parquet":
            _copy_parquet(origin.path, is_left, temporary)
        else:
            with temporary.open("wb") as file:
                _write(_content(source, is_left), file, packed=path.name.lower().endswith(".gz"))
        if isinstance(origin, File):
            origin.check()
        os.replace(temporary, path)  # noqa: PTH105
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _write(pieces: Iterable[bytes], file: IO[bytes], *, packed: bool) -> None:
    if not packed:
        file.writelines(pieces)
        return
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as archive:
        archive.writelines(pieces)


def _content(source: Source, is_left: bytearray) -> Iterator[bytes]:
    origin = source.origin
    if origin is None:
        numbered = zip(source.numbers, source, strict=True)
        return map(_line, (to_record(row) for number, row in numbered if is_left[number]))
    if isinstance(origin, Hub):
        return map(_line, _records_left(origin, is_left))
    if _suffix(origin.path) == ".json":
        return _as_list(map(_line, _records_left(origin, is_left)))
    return _lines_left(origin, is_left)


def _records_left(origin: File | Hub, is_left: bytearray) -> Iterator[Record]:
    found = all_records(origin)
    return (record for _, record in found if found.number < len(is_left) and is_left[found.number])


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """A value of a hub set that JSON has no form for, such as a date, as text.

    Raises:
        UserError: it is not text.
    """
    with suppress(AttributeError):
        return value.isoformat()
    raise UserError(
        f"JSON lines cannot hold the set's {type(value).__name__} values; download its files and "
        "scan these."
    )


def _as_list(lines: Iterable[bytes]) -> Iterator[bytes]:
    before = b"[\n"
    for line in lines:
        yield before + line.rstrip(b"\n")
        before = b",\n"
    yield b"\n]\n"


def _lines_left(origin: File, is_left: bytearray) -> Iterator[bytes]:
    """The lines of the records that are left, and those before the first record: a header."""
    starts, number, is_wanted = _starts(origin), 0, True
    start = next(starts, 0)
    with origin.path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        for place, line in enumerate(gzip.GzipFile(fileobj=raw) if packed else raw, 1):
            if place == start:
                number, start = number + 1, next(starts, 0)
                is_wanted = number < len(is_left) and bool(is_left[number])
            if is_wanted:
                yield line


class _Places(LeftOut):
    """Keeps the lines of bad records."""

    def __init__(self) -> None:
        super().__init__("skip")
        self.lines: list[int] = []

    def bad(self, file: str | Path, line: int, reason: str) -> None:
        self.lines.append(line)


def _starts(origin: File) -> Iterator[int]:
    """The first line of each record, of bad ones too."""
    left = _Places()
    for line, _ in records(origin.path, left, header=origin.header):
        yield from left.lines
        left.lines.clear()
        yield line
    yield from left.lines


def _copy_parquet(source: Path, is_left: bytearray, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 1
    with parquet.ParquetFile(source) as file, parquet.ParquetWriter(path, file.schema_arrow) as out:
        for batch in file.iter_batches():
            some = is_left[number : number + len(batch)].ljust(len(batch), b"\0")
            out.write_batch(batch.filter(pyarrow.array([bool(one) for one in some])))
            number += len(batch)
