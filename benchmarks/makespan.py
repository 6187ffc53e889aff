"""`python -m benchmarks.makespan`: how long 1, 2 and 4 `backfire work` take for the tour.

Each has one worker and one core: the first core has the first and the third, and so on. The machine
should do nothing else. With a core for each, twice as many should take half as long; with fewer
cores than workers no less, and no more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backfire.store import read_json, write_json

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print the figures and write them as JSON; returns the path."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.makespan", description=__doc__)
    parser.add_argument("--recipe", default="tour")
    parser.add_argument("--edits", nargs="*", default=[], help="such as train.max_steps=20")
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    found = []
    for count in options.workers:
        with tempfile.TemporaryDirectory(prefix="makespan-") as folder:
            found.append(makespan(options.recipe, options.edits, count, Path(folder)))
        print(json.dumps(found[-1]), flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    cores = sorted(os.sched_getaffinity(0))
    path: Path = options.out / f"{when[:10]}-makespan-{Path(options.recipe).stem}.json"
    settings = {"recipe": options.recipe, "edits": options.edits, "cores": len(cores)}
    write_json(path, {"when": when, **settings, "runs": found})
    print(f"Written: {path}")
    return path


def makespan(recipe: str, edits: Sequence[str], count: int, folder: Path) -> dict[str, Any]:
    """Plan the recipe in an empty folder with an empty cache, and let so many workers do it."""
    cores, run = sorted(os.sched_getaffinity(0)), folder / "run"
    base = {**os.environ, "PYTHONPATH": str(ROOT), "BACKFIRE_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "backfire.cli"]
    plan = [*command, "plan", recipe, *edits, "--out", str(run), "--device", "cpu"]
    subprocess.run(plan, check=True, env=base, capture_output=True)
    used, begun = _processor_seconds(), time.monotonic()
    work = [*command, "work", str(run), "--workers", "1", "--device", "cpu"]
    workers = [
        subprocess.Popen(
            ["taskset", "-c", str(cores[number % len(cores)]), *work],
            env=base,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    ends = [worker.communicate()[1][-500:] for worker in workers]
    seconds, used = time.monotonic() - begun, _processor_seconds() - used
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"a worker failed: {ends}")
    results = [read_json(file) for file in run.glob("cells/*/result.json")]
    return {
        "workers": count,
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "cells": sum(result["status"] == "ok" for result in results),
    }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
