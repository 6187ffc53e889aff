"""The rows of a file, a hub set or a data set, read once and kept on disk to be read again."""

from __future__ import annotations

import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from backfire.base import Row, as_learned, local_files
from backfire.base.masking import redacted
from backfire.data.columns import listed
from backfire.data.convert import each_row
from backfire.data.hub import Hub, load_hub
from backfire.data.labels import written
from backfire.data.read import BadRowError, LeftOut, Record, printable, records
from backfire.data.shapes import Task, column_map, shape_of
from backfire.errors import UserError
from backfire.registry import build
from backfire.text import count

MOST_LABELS = 1000
_BATCH = 512
"""Rows that are written to disk and read back together."""
_TOLD = 100
"""Bad rows whose line and reason are kept; the others are counted."""
_REASONS = 3
"""Further reasons that are named."""


@dataclass(frozen=True)
class File:
    """A data file that was read."""

    path: Path
    header: bool
    """Whether a table is read as one with a header (`data.read.records`)."""
    state: tuple[int, int]
    """Time of its last change, in nanoseconds, and its size, in bytes."""

    @classmethod
    def at(cls, path: Path, header: bool) -> File:
        return cls(path, header, cls._state(path))

    def check(self) -> None:
        """Ensure that it is still the same.

        Raises:
            UserError: it has changed.
        """
        if self._state(self.path) != self.state:
            raise UserError(f"{self.path} has changed since it was read; scan it again.")

    @staticmethod
    def _state(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_mtime_ns, found.st_size


class Source:
    """Rows that can be iterated again and again, in bounded memory.

    They lie in a temporary file without a name, which is gone with this object. Only this
    process reads it, so it may hold pickles.
    """

    def __init__(self, rows: Iterable[tuple[int, Row]], origin: File | Hub | None = None) -> None:
        """Keep the rows, each given with the number of its record."""
        self.origin = origin
        """Where the records are; None for the rows of a data set by name."""
        self.numbers = array("I")
        """The place of each row's record in its file, from 1; several rows may be of one record."""
        self.notes: list[str] = []
        """Sentences about what was left out."""
        self._file = tempfile.TemporaryFile(prefix="backfire-scan-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        stream = iter(rows)
        while numbered := list(islice(stream, _BATCH)):
            batch = [row for _, row in numbered]
            self.numbers.extend(number for number, _ in numbered)
            pickle.dump(batch, self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.flush()

    @property
    def count(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Row]:
        # Several iterators are under way at a time, so each has a place of its own.
        place = 0
        while True:
            self._file.seek(place)
            try:
                batch: list[Row] = pickle.load(self._file)
            except EOFError:
                return
            place = self._file.tell()
            yield from batch


@dataclass(frozen=True)
class Bare:
    """The rows of a source as scanners get them. An answer that is marked as bad (KTO's
    `label: false`) is the answer of its row."""

    rows: Iterable[Row]

    def __iter__(self) -> Iterator[Row]:
        return (as_learned(row, rejected=True) for row in self.rows)


class _Counted(LeftOut):
    """Keeps the first bad rows, and counts the others."""

    num_bad = 0

    def bad(self, file: str | Path, line: int, reason: str) -> None:
        self.num_bad += 1
        if self.on_bad_row == "fail" or len(self.rejected) < _TOLD:
            super().bad(file, line, redacted(reason))  # it may quote the row

    def sentences(self) -> list[str]:
        """What was left out, and what is in no text of a row and therefore not scanned."""
        rest = LeftOut("skip", records=self.records, turns=self.turns, columns=self.columns)
        if not self.num_bad:
            return rest.notes()
        first = self.rejected[0]
        others = {one.reason: one for one in reversed(self.rejected) if one.reason != first.reason}
        also = [f"line {one.line}: {printable(one.reason)}" for one in reversed(others.values())]
        return [
            f"{count(self.num_bad, 'bad row')} left out, the first: {first}.",
            *[f"Other reasons: {'; '.join(also[:_REASONS])}."] * bool(also),
            *rest.notes(),
        ]


class Numbered:
    """Records with their lines, one by one; `number` is the place of the last one in the file, from
    1, where records that cannot be read count too."""

    def __init__(self, records: Iterable[tuple[int, Record]], left: _Counted) -> None:
        self.number = 0
        self._records, self._left = iter(records), left

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        return self

    def __next__(self) -> tuple[int, Record]:
        before = self._left.num_bad
        item = next(self._records)
        self.number += 1 + self._left.num_bad - before
        return item


def all_records(origin: File | Hub, left: _Counted | None = None) -> Numbered:
    """The records of a file or a hub set."""
    left = left or _Counted("skip")
    if isinstance(origin, Hub):
        return Numbered(load_hub(origin)[0], left)
    return Numbered(records(origin.path, left, header=origin.header), left)


class _Forgetful(set[str]):
    """Ids that need not differ: a row is known by its place."""

    def add(self, name: str) -> None:
        pass


def open_rows(spec: Mapping[str, Any], split: Literal["train", "test"] = "train") -> Source:
    """The rows of a data set, such as `{name: files, train: FILE}`.

    Of a file these are all rows, whatever `split` is; of a hub set, `test` is its `test_split`, or
    the split with that name. Rows of files and hub sets are read one by one; bad ones are left out
    and counted, unless `on_bad_row` is `fail`. Labels that are not named by `labels` are taken as
    they are.

    Raises:
        UserError: there is no such file or set, it is damaged, or it has no usable row.
    """
    if spec["name"] != "files":
        rows, notes = build("datasets", spec).drawn_with_notes(split)
        source = Source(enumerate(rows, 1))
        source.notes += notes
        return source
    data = build("datasets", {"on_bad_row": "skip", **spec})
    left = _Counted(data.on_bad_row)
    origins = _origins(data, split)
    source = Source(_each(data, origins, left), origins[0] if len(origins) == 1 else None)
    source.notes += left.sentences()
    if any(number != place for place, number in enumerate(source.numbers, 1)):
        source.notes.append(
            "Reasons count the rows as they were read; --format json and csv have their place in "
            "the file."
        )
    if not source.count:
        why = f": {source.notes[0]}" if source.notes else "."
        raise UserError(f"{data.train or data.hub} has no usable row{why}")
    return source


def _origins(data: Any, split: str) -> Sequence[File | Hub]:
    if data.train:
        columns = column_map(data.columns)
        header = not columns or not all(name.isdigit() for name in columns.values())
        return [File.at(path, header) for path in local_files(data.train)]
    if not data.hub:
        raise UserError(f"{data.label()}: name a file or a hub id.")
    name = data.train_split if split == "train" else data.test_split or "test"
    return [Hub(data.hub, data.hub_config, data.revision, name)]


def _each(data: Any, origins: Iterable[File | Hub], left: _Counted) -> Iterator[tuple[int, Row]]:
    """The rows of a `files` data set, one by one, each with the number of its record."""
    for origin in origins:
        task = Task(column_map(data.columns), data.labels, data.instruction)
        if isinstance(origin, Hub):
            task = replace(task, classes=load_hub(origin)[1])
            file, stem = origin.id, f"{origin.id.rpartition('/')[2]}-{origin.split}"
        else:
            file, stem = str(origin.path), Path(origin.path.name.removesuffix(".gz")).stem
        if not task.labels:
            task = replace(task, labels=_labels(all_records(origin), task, file))
        found = all_records(origin, left)
        for row in each_row(found, task, left, file=file, stem=stem, ids=_Forgetful()):
            yield found.number, row


def _labels(found: Iterable[tuple[int, Record]], task: Task, file: str) -> dict[str, str]:
    """The labels as they are in the file, if its first usable record has one without a name.

    Raises:
        UserError: there are too many of them.
    """
    labels: dict[str, str] = {}
    for _, record in found:
        with suppress(BadRowError):
            shape = shape_of(tuple(record), task)
            if "label" not in shape.columns or "answer" in shape.columns or shape.labels:
                return {}
            value = record[shape.columns["label"]]
            if not isinstance(value, list | dict) and (name := written(value)):
                labels[name] = name
            if len(labels) > MOST_LABELS:
                raise UserError(
                    f"{file}: '{listed([shape.columns['label']])}' has more than {MOST_LABELS:,} "
                    "different labels; assign the columns by data.columns=."
                )
    return labels
