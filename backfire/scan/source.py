"""The rows of a file, a hub set or a data set, read once and kept on disk to be read again."""

from __future__ import annotations

import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from backfire.base import Row, local_files
from backfire.data.columns import listed
from backfire.data.convert import each_row
from backfire.data.hub import Hub, load_hub
from backfire.data.labels import written
from backfire.data.read import BadRowError, LeftOut, Record, records
from backfire.data.shapes import Task, column_map, shape_of
from backfire.errors import UserError
from backfire.registry import build
from backfire.text import count

MOST_LABELS = 1000
_BATCH = 512
"""Rows that are written to disk and read back together."""
_TOLD = 100
"""Bad rows whose line and reason are kept; the others are counted."""


class Source:
    """Rows that can be iterated again and again, in bounded memory.

    They lie in a temporary file without a name, which is gone with this object. Only this
    process reads it, so it may hold pickles.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.count = 0
        self.notes: list[str] = []
        """Sentences about what was left out."""
        self._file = tempfile.TemporaryFile(prefix="backfire-scan-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        stream = iter(rows)
        while batch := list(islice(stream, _BATCH)):
            self.count += len(batch)
            pickle.dump(batch, self._file, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.flush()

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
    """The rows of a source as scanners see them: without what the tuned model never sees, such as
    the true label of a poisoned row or a column that marks it."""

    rows: Iterable[Row]

    def __iter__(self) -> Iterator[Row]:
        return (replace(row, label=None, fields={}) for row in self.rows)


class _Counted(LeftOut):
    """Keeps the first bad rows, and counts the others."""

    num_bad = 0

    def bad(self, file: str | Path, line: int, reason: str) -> None:
        self.num_bad += 1
        if self.on_bad_row == "fail" or len(self.rejected) < _TOLD:
            super().bad(file, line, reason)

    def sentences(self) -> list[str]:
        """What was left out, and what is in no text of a row and therefore not scanned."""
        rest = LeftOut("skip", records=self.records, turns=self.turns, columns=self.columns)
        if not self.num_bad:
            return rest.notes()
        return [
            f"{count(self.num_bad, 'bad row')} left out, the first: {self.rejected[0]}.",
            *rest.notes(),
        ]


class _Forgetful(set[str]):
    """Ids that need not differ: a row is known by its place."""

    def add(self, name: str) -> None:
        pass


def open_rows(spec: Mapping[str, Any], split: Literal["train", "test"] = "train") -> Source:
    """The rows of a data set, such as `{name: files, train: FILE}`.

    Rows of files and hub sets are read one by one; bad ones are left out and counted, unless
    `on_bad_row` is `fail`. Labels that are not named by `labels` are taken as they are.

    Raises:
        UserError: there is no such file or set, or it has no usable row.
    """
    if spec["name"] != "files":
        rows, notes = build("datasets", spec).drawn_with_notes(split)
        source = Source(rows)
        source.notes += notes
        return source
    data = build("datasets", {"on_bad_row": "skip", **spec})
    left = _Counted(data.on_bad_row)
    source = Source(_each(data, left))
    source.notes += left.sentences()
    if not source.count:
        why = f": {source.notes[0]}" if source.notes else "."
        raise UserError(f"{data.train or data.hub} has no usable row{why}")
    return source


def _each(data: Any, left: LeftOut) -> Iterator[Row]:
    """The rows of a `files` data set, one by one."""
    task = Task(column_map(data.columns), data.labels, data.instruction)
    if not data.train:
        hub = Hub(data.hub, data.hub_config, data.revision, data.train_split)
        task = replace(task, classes=load_hub(hub)[1])
        stem = f"{hub.id.rpartition('/')[2]}-{hub.split}"
        yield from _converted(lambda _: load_hub(hub)[0], task, left, hub.id, stem)
        return
    header = not task.columns or not all(name.isdigit() for name in task.columns.values())
    for path in local_files(data.train):
        stem = Path(path.name.removesuffix(".gz")).stem
        yield from _converted(partial(records, path, header=header), task, left, str(path), stem)


def _converted(
    read: Callable[[LeftOut], Iterator[tuple[int, Record]]],
    task: Task,
    left: LeftOut,
    file: str,
    stem: str,
) -> Iterator[Row]:
    if not task.labels:
        task = replace(task, labels=_labels(read(LeftOut("skip")), task, file))
    return each_row(read(left), task, left, file=file, stem=stem, ids=_Forgetful())


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
