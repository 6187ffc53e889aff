"""`make bench`: the makespan of a matrix of related cells, by backfire and by a competent script.

Both run as commands, in alternation: backfire with a new cache each time; the script
(`benchmarks.matrix_script`) as two one-thread processes and as one process with all cores. The
parts of a cell are also compared alone, in one process, with TRL's `SFTTrainer` as a third side.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backfire.experiment import Experiment
from backfire.resources import cores
from backfire.store import write_atomic, write_json
from benchmarks import workload
from benchmarks.memory import ROOT
from benchmarks.tree import watched
from benchmarks.workload import AXES, Sizes

RESULTS = Path(__file__).parent / "results"
SCRIPTS = {"script, two processes": 2, "script, one process": 1}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    add = parser.add_argument
    add("--cells", type=int, nargs="+", default=[1, 4, 8, 24], choices=AXES)
    add(
        "--script-cells",
        type=int,
        default=4,  # with clean and poisoned rows, so that equality is that of both
        choices=[cells for cells in AXES if cells > 1],  # with each kind of training run
        help="cells that the script runs; its time for more is computed from its parts",
    )
    add("--repetitions", type=int, default=2, help="of the matrix that both sides run")
    add("--row-counts", type=int, nargs="*", default=[80, 480], help="training rows to vary")
    for field in fields(Sizes):
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    add("--parts-rows", type=int, default=160, help="training rows of the parts' comparison")
    add("--parts-test-rows", type=int, default=48, help="test rows of the parts' comparison")
    add("--parts-repetitions", type=int, default=2, help="0: do not compare the parts")
    add("--name", default="matrix", help="the result is written to <date>-<name>.json")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run it, print the page, write JSON and Markdown, and return the path of the JSON."""
    options = arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.pop("OMP_NUM_THREADS", None)
    from transformers.utils import logging

    from benchmarks.matrix_page import markdown

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about transformers
        result = run(options, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / f"{result['when'][:10]}-{options.name}.json"
    write_json(path, result)
    text = markdown(result)
    write_atomic(path.with_suffix(".md"), text)
    print(text)
    print(f"Written: {path} and .md")
    return path


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The content of the JSON file."""
    import torch

    from backfire.launch.environment import environment
    from benchmarks.flops import measured_peak
    from benchmarks.matrix_parts import compared

    begin, before = time.perf_counter(), os.getloadavg()[0]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    bench = Bench(folder, sizes)

    def peak() -> dict[str, float]:
        torch.set_num_threads(cores())
        types = sorted({"float32", sizes.compute})
        found = {name: measured_peak(getattr(torch, name)) for name in types}
        torch.set_num_threads(1)
        return found

    earlier, parts = peak(), None
    if options.parts_repetitions:
        cell = next(one.cell for one in bench.tunings(4) if one.cell.experiment.attack)
        train, test = cell.train[: options.parts_rows], cell.test[: options.parts_test_rows]
        cell = replace(cell, train=train, test=test)
        parts = compared(cell, folder / "parts", options.parts_repetitions, say)
    matrices = bench.matrices(options.cells, options.script_cells, options.repetitions)
    by_rows = bench.by_rows(options.row_counts, min(4, options.script_cells), matrices["runs"])
    return {
        "format": 1,
        "name": options.name,
        "when": when,
        "environment": environment(),
        "sizes": asdict(sizes),
        "peak_flops": earlier,
        "peak_flops_after": peak(),
        "parts": parts,
        **matrices,
        "by_rows": by_rows,
        "load": {"before": before, "after": os.getloadavg()[0]},
        "minutes": round((time.perf_counter() - begin) / 60, 1),
    }


class Bench:
    """Runs the matrices of both sides in a folder."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes, self.count = folder, sizes, 0
        workload.write(folder, sizes)
        self.env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def cells(self, number: int) -> tuple[Experiment, ...]:
        return workload.cells_of(workload.write_recipe(self.folder, self.sizes, number))

    def tunings(self, number: int) -> list[workload.Tuning]:
        return workload.tunings(self.cells(number))

    def matrices(
        self, numbers: Sequence[int], script_cells: int, repetitions: int
    ) -> dict[str, Any]:
        """All matrices; both sides take turns on the one that the script runs."""
        from benchmarks.matrix_check import equality
        from benchmarks.matrix_limit import needed
        from benchmarks.matrix_profile import replies_of

        found: dict[str, list[dict[str, Any]]] = {"backfire": [], **{name: [] for name in SCRIPTS}}
        places: dict[Any, Path] = {}
        for turn in range(repetitions):
            for side in list(found)[:: -1 if turn % 2 else 1]:
                places[side] = self._place()
                found[side].append(self._run(side, places[side], script_cells))
        places[script_cells] = places["backfire"]
        for number in sorted(set(numbers) - {script_cells}):
            places[number] = self._place()
            found["backfire"].append(self._run("backfire", places[number], number))
        largest = max([*numbers, script_cells])
        cells, work = self.cells(largest), places[largest] / "run"
        least = needed(cells, replies_of(cells, work))
        cells, work = self.cells(script_cells), places["backfire"]
        script = places["script, two processes"]
        equal = equality(cells, work / "run", work / "cache", script)
        every = sorted({*numbers, script_cells, min(4, script_cells), 32})
        return {
            "runs": found,
            "computed": {str(number): self._computed(found, number) for number in every},
            "least_flops": {"cells": largest, **least},
            "equality": equal,
        }

    def _computed(
        self, found: Mapping[str, list[dict[str, Any]]], number: int, longer: float = 1.0
    ) -> dict[str, float]:
        """Makespan of each form of the script."""
        from benchmarks.matrix_profile import computed

        runs = self.tunings(number)
        return {
            side: computed(found[side], runs, min(count, cores()), longer)
            for side, count in SCRIPTS.items()
        }

    def by_rows(
        self, counts: Sequence[int], number: int, found: Mapping[str, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Makespans of so many cells with other numbers of training rows; the script's are
        computed, with training in proportion to its rows."""
        lines = []
        for rows in counts:
            folder = self.folder / f"rows-{rows}"
            folder.mkdir()
            bench = Bench(folder, replace(self.sizes, rows=rows))
            line = bench._run("backfire", bench._place(), number)
            computed = self._computed(found, number, rows / self.sizes.rows)
            lines.append({**line, "computed": computed})
        return lines

    def _place(self) -> Path:
        self.count += 1
        place = self.folder / f"work-{self.count}"
        place.mkdir()
        return place

    def _run(self, side: str, place: Path, number: int) -> dict[str, Any]:
        """Run a matrix; what it needed, and where its core-seconds went."""
        from benchmarks.matrix_profile import of_backfire, of_script

        say(f"{side}, {workload.described(number)}, {self.sizes.rows} rows")
        file, cells = workload.write_recipe(self.folder, self.sizes, number), self.cells(number)
        if side == "backfire":
            command = ["-m", "backfire.cli", "run", str(file), "--out", str(place / "run")]
            env = {**self.env, "BACKFIRE_CACHE": str(place / "cache")}
        else:
            work = {"alignment": workload.alignment(cells[0]), "tunings": self.tunings(number)}
            (place / "work.pickle").write_bytes(pickle.dumps(work))
            command = ["-m", "benchmarks.matrix_script", str(place)]
            command += ["--processes", str(min(SCRIPTS[side], cores()))]
            env = self.env
        used = watched([sys.executable, "-W", "ignore", *command], env, place / "output.txt")
        say(f"  {used.seconds:.1f} s, {used.cpu:.1f} core-s, {used.peak_mb:.0f} MB")
        profile = of_backfire(place / "run", number) if side == "backfire" else of_script(place)
        return {"cells": number, "rows": self.sizes.rows, **asdict(used), **profile}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
