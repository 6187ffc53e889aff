"""Evaluation in portions, each of which is on disk before the next begins, so that an interrupted
evaluation continues.

A portion depends on the rows, the model and the kind of device, and is measured whole, so an
evaluation that was interrupted gives the same numbers as one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire.evaluate import journal
from backfire.store import CHECKPOINTS, digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORK = {"cpu": 6e12, "cuda": 3e15}
"""FLOPs of a portion: one or two minutes. Shorter ones would more often leave places of a batch
empty, at their ends."""


def portions(costs: Sequence[int], model: PreTrainedModel) -> list[list[int]]:
    """Numbers of the rows of each portion, in order; the costliest rows are in the first. `costs`
    are the tokens of each row."""
    most = WORK.get(model.device.type, WORK["cuda"]) / (2.0 * model.num_parameters())
    parts, total = list[list[int]](), 0
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if not parts or total + costs[number] > most:
            parts.append([])
            total = 0
        parts[-1].append(number)
        total += costs[number]
    return [sorted(part) for part in parts]


class Finished:
    """The measurements of finished rows, by number and id, in the folder of an unfinished stage."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder and folder / CHECKPOINTS / "rows.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        for entry in journal.entries(self._file) if self._file else ():
            row, measured = str(entry.get("row")), entry.get("measured") or {}
            if _sum(row, measured) == entry.get("sum"):
                self.rows[row] = measured

    def add(self, measured: Mapping[str, dict[str, Any]], *, last: bool) -> None:
        """Add rows. The last ones are not written here, since the whole stage is written next."""
        self.rows |= measured
        if self._file and not last:
            lines = (
                {"row": row, "measured": one, "sum": _sum(row, one)}
                for row, one in measured.items()
            )
            journal.append(self._file, lines)


def _sum(row: Any, measured: Any) -> str:
    return digest([row, measured])
