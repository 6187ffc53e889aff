"""Shows the progress of a run: live bars in a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from backfire.errors import EXIT_CLASSES
from backfire.launch.log import Event, JsonLines, Log
from backfire.plan import Job
from backfire.text import line

_ENDS = {"ok", *EXIT_CLASSES}


def titles(jobs: Sequence[Job]) -> dict[str, str]:
    """A title for each job, by id: kind, number of how many, name, and the values of the matrix
    that tell it from other jobs of this name. Its text may be from a recipe of somebody else."""
    names, shared = {job.id: job.title for job in jobs}, _shared_axes(jobs)
    points = {job.id: job.axes or shared.get(job.id, {}) for job in jobs}
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs:
        alike.setdefault((job.kind, names[job.id]), []).append(points[job.id])
    differing = {key: _differing(found) for key, found in alike.items()}
    total, numbers, out = Counter(job.kind for job in jobs), Counter[str](), {}
    for job in jobs:
        numbers[job.kind] += 1
        name, point = names[job.id], points[job.id]
        axes = [axis for axis in point if axis in differing[job.kind, name]]
        some = ", ".join(f"{axis}={_short(point[axis])}" for axis in axes)
        name = f"{name} ({some})" if some else name
        out[job.id] = line(f"{job.kind} {numbers[job.kind]}/{total[job.kind]} {name}")
    return out


def _differing(points: Sequence[Mapping[str, Any]]) -> set[str]:
    """The axes in which some of these points differ."""
    axes = {axis for point in points for axis in point}
    return {axis for axis in axes if len({_short(point.get(axis)) for point in points}) > 1}


def _short(value: Any) -> str:
    """A matrix value in one line: a component as its name and settings."""
    if isinstance(value, dict):
        settings = (f"{key} {_short(item)}" for key, item in value.items() if key != "name")
        return ", ".join([str(value.get("name", "")), *settings]).removeprefix(", ")
    return str(value)


def _shared_axes(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Id of a job -> the values of the matrix that all jobs that need it have in common."""
    shared: dict[str, dict[str, Any]] = {}
    for job in jobs:
        for name in job.after:
            known = shared.setdefault(name, job.axes)
            shared[name] = {k: v for k, v in known.items() if k in job.axes and job.axes[k] == v}
    return shared


class ProgressDisplay:
    """Displays the running jobs: live on a terminal, otherwise through a `Log`, in JSON if stderr
    is a `JsonLines`."""

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self.console, self.live = console, sys.stderr.isatty()
        self.titles = titles(jobs)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not self.live,
            transient=True,
        )
        num_cells = sum(job.kind == "cell" for job in jobs)
        self.total = self.progress.add_task("cells", total=num_cells, text="")
        self.tasks: dict[str, TaskID] = {}
        self.log = Log(sys.stderr.put_event if isinstance(sys.stderr, JsonLines) else self._print)

    def __enter__(self) -> ProgressDisplay:
        self.progress.start()
        if not self.live:
            self.log.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.log.stop()
        self.progress.stop()

    def watch(self, job: Job, text: str, done: int, total: int) -> None:
        """Update a job's progress; an exit class as `text` ends it."""
        title, text = self.titles[job.id], line(text)
        task = self.tasks.get(job.id)
        if task is None:
            task = self.tasks[job.id] = self.progress.add_task(title, total=total, text=text)
        self.progress.update(task, completed=done, total=total, text=text)
        if text in _ENDS:
            self.progress.remove_task(self.tasks.pop(job.id))
            if job.kind == "cell":
                self.progress.advance(self.total)
            if not self.live:
                self.log.ended(job, title, text)
        elif not self.live:
            self.log.at(job, title, text, done, total)

    def _print(self, event: Event) -> None:
        if event.event != "start":
            self.console.print(event.line(), soft_wrap=True, highlight=False, markup=False)
