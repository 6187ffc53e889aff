"""Loads rows from files and hub data sets, and hashes the files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from backfire.base import Row
from backfire.data.columns import fold
from backfire.data.convert import to_rows
from backfire.data.hub import Hub, load_hub
from backfire.data.read import LeftOut, Record, records
from backfire.data.shapes import Task
from backfire.rng import derive

Prepare = Callable[[Record], Record | None]
"""Adapts each record before its shape is recognized; None leaves it out."""
Apart = Literal["prompt", "instruction"]
Split = Literal["train", "test"]


def file_rows(files: Sequence[Path], task: Task, left: LeftOut, prepare: Prepare) -> list[Row]:
    """The rows of all files, in order, each with a unique id."""
    rows: list[Row] = []
    ids: set[str] = set()
    header = not task.columns or not all(name.isdigit() for name in task.columns.values())
    for file in files:
        prepared = _prepared(records(file, left, header=header), prepare, left)
        stem = Path(file.name.removesuffix(".gz")).stem
        rows += to_rows(prepared, task, left, file=str(file), stem=stem, ids=ids)
    return rows


def hub_rows(hub: Hub, task: Task, left: LeftOut, prepare: Prepare) -> list[Row]:
    """The rows of one split of a hub set; if the set names its classes, `labels` is optional."""
    numbered, classes = load_hub(hub)
    task = replace(task, classes=classes)
    stem = f"{hub.id.rpartition('/')[2]}-{hub.split}"
    prepared = _prepared(numbered, prepare, left)
    return to_rows(prepared, task, left, file=hub.id, stem=stem, ids=set())


def _prepared(
    numbered: Iterable[tuple[int, Record]], prepare: Prepare, left: LeftOut
) -> Iterator[tuple[int, Record]]:
    for line, record in numbered:
        if (prepared := prepare(record)) is not None:
            yield line, prepared
        else:
            left.records["left out by the rules of the data set"] += 1


def is_set_apart(row: Row, by: Apart, share: float, seed: int) -> bool:
    """Whether the row belongs to the test share; rows with equal text are on the same side."""
    text: str = getattr(row, by)
    return derive(seed, "test", text or row.answer) < share * 2**63


SPLITS = ("split", "partition", "set", "subset", "fold", "split_name")
_SIDES = {"train": "train", "training": "train"}
_SIDES |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_SIDES |= dict.fromkeys(("dev", "development", "val", "valid", "validation"), "held out")


def by_column(rows: Sequence[Row], split: str, left: LeftOut) -> list[Row]:
    """The rows of one split if a field names the split of every row, else none.

    Validation rows are the test rows if there are no others.
    """
    for name in (name for name in (rows[0].fields if rows else ()) if fold(name) in SPLITS):
        values = {row.fields.get(name, "") for row in rows}
        sides = {value: side for value in values if (side := _SIDES.get(value.casefold()))}
        if set(sides) == values and "train" in sides.values() and len(set(sides.values())) > 1:
            break
    else:
        return []
    if split == "test" and "test" not in sides.values():
        split = "held out"
    left.columns.pop(name, None)
    spare = [value for value, side in sides.items() if side == "held out"]
    if "test" in sides.values() and spare:
        for row in rows:
            if row.fields[name] in spare:
                left.records[f"left out: '{name}' is {row.fields[name]}"] += 1
    return [row for row in rows if sides[row.fields[name]] == split]
