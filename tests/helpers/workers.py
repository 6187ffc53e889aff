"""Workers whose jobs only sleep: real processes, claims and files, without torch."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from backfire.experiment import Machine
from backfire.launch.folder import read_plan, write_plan
from backfire.launch.job import RunFolder, report
from backfire.launch.stop import Stop
from backfire.launch.work import Run, work
from backfire.plan import Job, jobs
from backfire.recipe import parse
from backfire.store import Store, write_json
from tests.helpers.patience import LONG

SEEDS = """# Does it?
data: {name: sandbox-reviews, rows: 100}
matrix:
  seed: [0, 1, 2, 3, 4, 5, 6, 7]
"""


def planned(path: Path, text: str = SEEDS, *edits: str) -> list[Job]:
    """The jobs of a recipe, planned in a run folder."""
    recipe = parse("r", text, edits=edits)
    found = jobs(recipe.cells, recipe.axes)
    write_plan(path, recipe, found)
    return found


def sleeps(path: Path, seconds: float = 0.0) -> Run:
    """Runs a job by sleeping, and notes it in `<path>/ran`."""

    def run(
        job: Job, folder: RunFolder, store: Store, machine: Machine, progress: Any, _: Any
    ) -> str:
        with (path / "ran").open("a") as file:
            file.write(f"{job.id} {os.getpid()}\n")
        end = time.monotonic() + seconds
        progress(0, 1, "sleeping")
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))
            progress(0, 1, "sleeping")
        return ended(job, folder)

    return run


def ended(job: Job, folder: RunFolder) -> str:
    """Write that a job has ended well."""
    if job.kind != "cell":
        return report(job, folder, "ok", "")
    place = folder.cell(job.experiment, job.key)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "result.json", {"cell": job.title, "key": job.key, "status": "ok"})
    return "ok"


def alone(path: Path, run: Run, **options: Any) -> dict[str, str]:
    """Work in this process."""
    plan = read_plan(path)
    store = options.pop("store", Store(path / "cache"))
    watch = options.pop("watch", lambda *_: None)
    machine = options.pop("machine", Machine())
    folder = RunFolder(path, plan.recipe)
    return work(plan.jobs, folder, store, machine, watch, run=run, **options)


def start(path: Path, run: Run, **options: Any) -> BaseProcess:
    """Work in another process."""
    process = multiprocessing.get_context("fork").Process(
        target=_in_process, args=(path, run, options)
    )
    process.start()
    return process


def _in_process(path: Path, run: Run, options: dict[str, Any]) -> None:
    stop = Stop()
    with stop.on_signals():
        alone(path, run, stop=stop, **options)


def together(path: Path, count: int, run: Run, **options: Any) -> None:
    """Work in several processes."""
    processes = [start(path, run, **options) for _ in range(count)]
    for process in processes:
        process.join(LONG)
        assert process.exitcode == 0


def meets(path: Path, count: int) -> Run:
    """Runs a job of training only once so many workers have one, each its own."""
    place = path / "at work"
    place.mkdir()

    def run(job: Job, folder: RunFolder, *rest: Any) -> str:
        (place / f"{os.getpid()}").touch()
        while job.kind == "train" and len(list(place.iterdir())) < count:
            time.sleep(0.01)
        return sleeps(path)(job, folder, *rest)

    return run


def ran(path: Path) -> list[str]:
    """The jobs that were run, sorted, each as often as it was."""
    return sorted(line.split()[0] for line in (path / "ran").read_text().splitlines())


def names(found: Sequence[Job]) -> list[str]:
    return sorted(job.id for job in found)


def dead_process() -> int:
    """The number of a process that has ended."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    assert process.pid
    return process.pid
