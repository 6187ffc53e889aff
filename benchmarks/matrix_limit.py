"""The least work that a matrix needs, to compare with what the machine's products could do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from backfire.base import Row
from backfire.commands.memory import Size, size
from backfire.experiment import Experiment
from benchmarks.cells import Cell
from benchmarks.flops import least_flops
from benchmarks.lisa_trainer import with_alignment
from benchmarks.matrix_script import ALIGNED
from benchmarks.workload import Tuning, alignment, tunings


def needed(cells: Sequence[Experiment], replies: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """FLOPs of each part of a matrix: no training run or evaluation is repeated, no position is
    padding, and what all rows of a pass share is computed once.

    Args:
        replies: training run, or the alignment -> what its model replied to the requests.
    """
    first = alignment(cells[0])
    shape = size(first.experiment, first.base)
    found = {"alignment": _training(shape, first, ()), "training": 0.0}
    found |= {"label scoring": 0.0, "generation": 0.0}
    runs = tunings(cells)
    plain = replace(runs[0], name=ALIGNED, scored={"clean": runs[0].scored["clean"]})
    for tuning in runs:
        found["training"] += _training(shape, tuning.cell, tuning.aligned)
    for tuning in (plain, *runs):
        found["label scoring"] += sum(_scoring(shape, tuning, r) for r in tuning.scored.values())
        found["generation"] += _generation(shape, tuning, replies[tuning.name])
    return found


def _training(shape: Size, cell: Cell, aligned: Sequence[Row]) -> float:
    return sum(
        least_flops(
            shape,
            [item.ids for item in rows],
            sum(len(item.answer_ids) for item in rows),
            trains=True,
        )
        for rows in _steps(cell, aligned)
    )


def _steps(cell: Cell, aligned: Sequence[Row]) -> Iterator[Sequence[Any]]:
    renderer, count = cell.renderer(), cell.experiment.train.batch_size
    items: Any = renderer.render(cell.train)
    if aligned:
        items = with_alignment(cell, items, renderer.render(aligned))  # type: ignore[arg-type]
    return (items[start : start + count] for start in range(0, len(items), count))


def _scoring(shape: Size, tuning: Tuning, rows: Sequence[Row]) -> float:
    prompts = [item.prompt_ids for item in tuning.cell.renderer().render(rows)]
    return least_flops(shape, prompts, len(prompts), trains=False)


def _generation(shape: Size, tuning: Tuning, replies: Sequence[str]) -> float:
    renderer = tuning.cell.renderer()
    prompts = [item.prompt_ids for item in renderer.render(tuning.requests)]
    written = [renderer.tokenizer.encode(text) for text in replies]
    both = [[*p, *w] for p, w in zip(prompts, written, strict=True)]
    return least_flops(shape, both, sum(map(len, written)), trains=False)
