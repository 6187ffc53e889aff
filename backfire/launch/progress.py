"""Shows the progress of a run: live bars in a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from backfire.errors import EXIT_CLASSES
from backfire.plan import Job

_ENDS = {"ok", *EXIT_CLASSES}
_QUIET_SECONDS = 60.0  # longest time without a log line for a running job
_BUSY_SECONDS = 1.0  # shortest time between two progress lines of a job


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
    """Displays the running jobs: live on a terminal, otherwise through a `Log`."""

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
        self.log = Log(self._print)

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
                self.log.ended(job.id, title, text)
        elif not self.live:
            self.log.at(job.id, title, text, done, total)

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)


@dataclass
class _State:
    """State of a running job."""

    title: str
    started: float
    logged: float
    """Time of its last log line."""
    text: str = ""
    done: int = 0
    total: int = 1
    tenth: int = 0

    def line(self, now: float) -> str:
        share = f"{self.done / max(self.total, 1):.0%} ({self.done:,} of {self.total:,}), "
        done = share if self.total > 1 else ""
        return f"{self.title}: {done}{self.text}, {now - self.started:.0f} s"


class Log:
    """Writes a line for every tenth of a job, at least one per minute, and one at its end."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.write, self.clock = write, clock
        self.jobs: dict[str, _State] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Start the reminders about jobs that report nothing, such as while loading a model."""
        threading.Thread(target=self._remind, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def at(self, job: str, title: str, text: str, done: int, total: int) -> None:
        """Record the progress of the job with this id."""
        with self._lock:
            now = self.clock()
            state = self.jobs.setdefault(job, _State(title, now, now))
            tenth = 10 * done // max(total, 1)
            if total != state.total or tenth < state.tenth:
                state.tenth = 0  # the next part of the job counts from 0 again
            state.text, state.done, state.total = text, done, total
            if total > 1 and tenth > state.tenth and now - state.logged >= _BUSY_SECONDS:
                state.tenth = tenth
                self._log(state, now)

    def ended(self, job: str, title: str, kind: str) -> None:
        """Record the end of a job."""
        with self._lock:
            self.jobs.pop(job, None)
            self.write(f"{title}: {kind}")

    def remind(self) -> None:
        """Log every job that has been silent for a minute."""
        with self._lock:
            now = self.clock()
            for state in self.jobs.values():
                if now - state.logged >= _QUIET_SECONDS:
                    self._log(state, now)

    def _log(self, state: _State, now: float) -> None:
        state.logged = now
        self.write(state.line(now))

    def _remind(self) -> None:
        while not self._over.wait(1.0):
            self.remind()
