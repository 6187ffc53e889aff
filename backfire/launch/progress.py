"""Shows the progress of a run: live bars in a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from backfire.errors import EXIT_CLASSES
from backfire.launch.log import Event, JsonLines, Log
from backfire.plan import Job

_ENDS = {"ok", *EXIT_CLASSES}


def titles(jobs: Sequence[Job]) -> dict[str, str]:
    """A title for each job, by id: kind, number of how many, name, and the values of the matrix
    that tell it from other jobs of this name."""
    out = {}
    for kind in dict.fromkeys(job.kind for job in jobs):
        alike = [job for job in jobs if job.kind == kind]
        points = [_common_axes(job, jobs) for job in alike]
        for number, (job, point) in enumerate(zip(alike, points, strict=True), start=1):
            others = [p for j, p in zip(alike, points, strict=True) if j.title == job.title]
            differs = {a: v for a, v in point.items() if any(p.get(a) != v for p in others)}
            some = ", ".join(f"{axis}={_short(value)}" for axis, value in differs.items())
            name = f"{job.title} ({some})" if some else job.title
            out[job.id] = f"{kind} {number}/{len(alike)} {name}"
    return out


def _short(value: Any) -> str:
    """A matrix value in one line: a component as its name and settings."""
    if isinstance(value, dict):
        settings = (f"{key} {_short(item)}" for key, item in value.items() if key != "name")
        return ", ".join([str(value.get("name", "")), *settings]).removeprefix(", ")
    return str(value)


def _common_axes(job: Job, jobs: Sequence[Job]) -> dict[str, Any]:
    """The values that all cells that need this job have in common."""
    points = [job.axes] if job.axes else [other.axes for other in jobs if job.id in other.after]
    return {
        axis: value
        for axis, value in (points[0].items() if points else ())
        if all(axis in point and point[axis] == value for point in points)
    }


class ProgressDisplay:
    """Displays the running jobs: live on a terminal, otherwise through a `Log`, in JSON if stderr
    is a `JsonLines`."""

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self.console, self.live = console, sys.stderr.isatty()
        self.titles = titles(jobs)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"),
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
        title = self.titles[job.id]
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
