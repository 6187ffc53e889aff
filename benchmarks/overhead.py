"""`python -m benchmarks.overhead`: processor seconds of a cell when its model and data are tiny.

The cells are those of the matrix of `make bench`, on a random Llama of two layers with a few rows
each, so that hardly anything is computed. One worker runs 2 and 24 of them; the difference is
divided by 22, so the start does not count. With `--against`, another checkout takes turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import workload
from benchmarks.memory import ROOT
from benchmarks.tree import watched

SIZES = workload.Sizes(rows=16, test_rows=8, requests=8, new_tokens=8, shape="tiny")


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Measure, print and return the processor seconds of a cell, one per repetition and side."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--cells", type=int, nargs=2, default=[2, 24], choices=workload.AXES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    options = parser.parse_args(argv)
    sides = {"this": ROOT, **({"other": options.against} if options.against else {})}
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        workload.write(folder, SIZES)
        for turn in range(options.repetitions):
            for side in list(sides)[:: -1 if turn % 2 else 1]:
                place = folder / f"{side}-{turn}"
                found[side].append(_of_a_cell(folder, place, sides[side], options.cells))
    for side, seconds in found.items():
        each = ", ".join(f"{one:.3f}" for one in seconds)
        print(f"{side}: {median(seconds):.3f} core-s a cell ({each})")
    return found


def _of_a_cell(folder: Path, place: Path, checkout: Path, counts: Sequence[int]) -> float:
    """Processor seconds of a cell: the difference of two matrices, by the difference in cells."""
    few, many = (_cpu(folder, place / str(count), checkout, count) for count in counts)
    return (many - few) / (counts[1] - counts[0])


def _cpu(folder: Path, place: Path, checkout: Path, count: int) -> float:
    """Processor seconds of a run with so many cells, and an empty cache."""
    place.mkdir(parents=True)
    file = workload.write_recipe(folder, SIZES, count)
    command = [sys.executable, "-m", "backfire.cli", "run", str(file), "--out", str(place / "run")]
    own = {"PYTHONPATH": str(checkout), "BACKFIRE_CACHE": str(place / "cache")}
    env = {**os.environ, **own, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    one_worker = [*command, "--workers", "1", "--device", "cpu"]
    return watched(one_worker, env, place / "output.txt").cpu


if __name__ == "__main__":
    main()
