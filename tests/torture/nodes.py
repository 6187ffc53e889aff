"""Workers on several hosts, as far as one machine can play them: each process has a host name of
its own and sees the others' processes as those of another host."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfire.plan import Job
from backfire.store import Store
from tests.torture.cell import Say

STALE = 1.5
"""Seconds without a heartbeat after which a claim is stale; five minutes in earnest."""


@dataclass(frozen=True)
class Host:
    """What is special about a host."""

    name: str
    clock_offset_seconds: float = 0.0
    """By how much its clock is wrong."""
    short_beats: bool = True
    """Whether its heartbeats are shortened. All hosts of a run must agree on that: claims without
    a short heartbeat look stale to those that expect one."""


def work_as(say: Say, root: Path, host: Host) -> dict[str, str]:
    """Work on the run in `root / "out"` until nothing is left, as a worker of this host. Says
    (job, activity) whenever a worker reports progress; returns exit classes by job."""
    from backfire.experiment import Machine
    from backfire.launch.folder import read_plan
    from backfire.launch.job import RunFolder
    from backfire.launch.work import work

    become(host)
    count_makes(root)
    plan = read_plan(root / "out")

    def watch(job: Job, text: str, done: int, total: int) -> None:
        say((job.id, text))

    machine = Machine(device="cpu", workers=1, checkpoint_seconds=0)
    folder = RunFolder(root / "out", plan.recipe)
    return work(plan.jobs, folder, Store(root / "cache"), machine, watch)


def become(host: Host) -> None:
    """Let this process be on this host."""
    from backfire import claims

    claims.socket.gethostname = lambda: host.name  # type: ignore[attr-defined]
    claims.place = lambda: host.name  # type: ignore[assignment]
    if host.short_beats:
        claims.BEAT, claims.STALE = STALE / 10, STALE
    clock = time.time
    time.time = lambda: clock() + host.clock_offset_seconds


def count_makes(root: Path) -> None:
    """Append a line to `root / "begun"` for each stage that is begun from here on, and one to
    `root / "made"` for each that is made, and for each cell."""
    from backfire.launch import job

    once, write = Store.once, job._write_result

    def add(name: str, line: str) -> None:
        with (root / name).open("a") as opened:  # one short write: lines do not mix
            opened.write(f"{line} {os.getpid()}\n")

    def counted(self: Store, stage: Any, make: Any, **options: Any) -> Path:
        def made(folder: Path) -> None:
            add("begun", f"{stage.kind}/{stage.slug}-{stage.key}")
            make(folder)
            add("made", f"{stage.kind}/{stage.slug}-{stage.key}")

        return once(self, stage, made, **options)

    def written(one: Job, *rest: Any) -> None:
        write(one, *rest)
        add("made", one.id)

    Store.once, job._write_result = counted, written  # type: ignore[method-assign]


def repeats(file: Path) -> int:
    """How often something was made, or begun, that had been before."""
    made = [line.split()[0] for line in file.read_text().splitlines()]
    return len(made) - len(set(made))


def plan(root: Path, recipe: Any) -> Sequence[Job]:
    """Write the plan of a run into `root / "out"`."""
    from backfire.launch.folder import write_plan
    from backfire.plan import jobs

    found = jobs(recipe.cells, recipe.axes)
    write_plan(root / "out", recipe, found)
    return found
