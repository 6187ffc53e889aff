"""How far a run is: a line per running job on a terminal, lines for a log elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from backfire.errors import EXIT_CLASSES
from backfire.plan import Job

_ENDS = {"ok", *EXIT_CLASSES}
_QUIET_SECONDS = 60.0  # a log says at least this often that a job is still at work
_BUSY_SECONDS = 1.0  # and no more often than this that it is some per cent further


class Board:
    """Shows what the jobs of a run are doing."""

    def __init__(self, console: Console, num_cells: int) -> None:
        self.console, self.live = console, sys.stderr.isatty()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self.live,
            transient=True,
        )
        self.total = self.progress.add_task("cells", total=num_cells, text="")
        self.tasks: dict[str, TaskID] = {}
        self.log = Log(self._print)

    def __enter__(self) -> Board:
        self.progress.start()
        if not self.live:
            self.log.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.log.stop()
        self.progress.stop()

    def watch(self, job: Job, text: str, done: int, total: int) -> None:
        """Show how far a job is; an exit class as `text` ends it."""
        title = f"{job.kind} {job.title}"
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
    """What a log knows of a running job."""

    title: str
    begun: float
    said: float
    """When its last line was written."""
    text: str = ""
    done: int = 0
    total: int = 1
    tenth: int = 0

    def line(self, now: float) -> str:
        share = f"{self.done / max(self.total, 1):.0%} ({self.done:,} of {self.total:,}), "
        known = share if self.total > 1 else ""
        return f"{self.title}: {known}{self.text}, {now - self.begun:.0f} s"


class Log:
    """A line per job for every tenth of its work, and at least one a minute; one at its end."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.write, self.clock = write, clock
        self.jobs: dict[str, _State] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """From now on also say what takes long without a word, such as a model that is loaded."""
        threading.Thread(target=self._remind, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def at(self, job: str, title: str, text: str, done: int, total: int) -> None:
        """How far a job is, which is known by its id."""
        with self._lock:
            now = self.clock()
            state = self.jobs.setdefault(job, _State(title, now, now))
            tenth = 10 * done // max(total, 1)
            if total != state.total or tenth < state.tenth:
                state.tenth = 0  # another part of the job, with a count of its own
            state.text, state.done, state.total = text, done, total
            if total > 1 and tenth > state.tenth and now - state.said >= _BUSY_SECONDS:
                state.tenth = tenth
                self._say(state, now)

    def ended(self, job: str, title: str, kind: str) -> None:
        """A job is over."""
        with self._lock:
            self.jobs.pop(job, None)
            self.write(f"{title}: {kind}")

    def remind(self) -> None:
        """Say of each job that has been quiet for a minute where it is."""
        with self._lock:
            now = self.clock()
            for state in self.jobs.values():
                if now - state.said >= _QUIET_SECONDS:
                    self._say(state, now)

    def _say(self, state: _State, now: float) -> None:
        state.said = now
        self.write(state.line(now))

    def _remind(self) -> None:
        while not self._over.wait(1.0):
            self.remind()
