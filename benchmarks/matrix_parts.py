"""The parts of a cell on both sides in one process, in alternation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell
from benchmarks.measure import measure

PARTS = {
    "training": "training loop",
    "training, TRL": "training loop, trl",
    "label_scoring": "scores, baseline, grouped",
    "generation": "replies",
}
"""Part -> its ratio in a measurement. The script scores labels with lm-eval's shortcut."""


def compared(
    cell: Cell, folder: Path, repetitions: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Ratios of the script's processor time to backfire's by part, all times, and whether both
    sides get the same."""
    found = measure(cell, folder, repetitions, log)
    ratios, cpu = found["ratios"], found["cpu"]["ratios"]
    return {
        **found,
        "ratios": {part: cpu[name] for part, name in PARTS.items() if name in cpu},
        "ratios of time": {part: ratios[name] for part, name in PARTS.items() if name in ratios},
        "rows": {"train": len(cell.train), "test": len(cell.test)},
        "batch_size": cell.experiment.train.batch_size,
    }
