"""The log of a run where there is no terminal: lines for people, or JSON for machines."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from backfire.plan import Job
from backfire.progress import facts
from backfire.text import clean, duration

_QUIET_SECONDS = 60.0  # longest time without a log line for a running job
_BUSY_SECONDS = 1.0  # shortest time between two progress lines of a job


@dataclass(frozen=True)
class Event:
    """The start, progress or end of a job, as `--log-format json` writes it."""

    event: Literal["start", "progress", "end"]
    job: str
    """Its id: equal in every run of the recipe."""
    kind: str
    title: str
    activity: str | None = None
    done: int | None = None
    """Steps or rows of this activity."""
    total: int | None = None
    loss: float | None = None
    rows_per_second: float | None = None
    seconds_left: float | None = None
    """Until the end of this activity, at the pace since its start."""
    seconds: float = 0.0
    """Since the start of the job."""
    exit: str | None = None
    """`ok` or an exit class, at the end."""

    def line(self) -> str:
        """The event on one line, for people."""
        if self.event == "end":
            return f"{self.title}: {self.exit}"
        parts = [self.activity or self.event]
        if self.done is not None and self.total:
            parts.append(f"{self.done / self.total:.0%} ({self.done:,} of {self.total:,})")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.rows_per_second is not None:
            parts.append(f"{self.rows_per_second:g} rows/s")
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        return f"{self.title}: {', '.join(parts)}, {duration(self.seconds)}"


@dataclass
class _State:
    """State of a running job."""

    job: Job
    title: str
    started: float
    logged: float
    """Time of its last log line."""
    text: str = ""
    done: int = 0
    total: int = 1
    tenth: int = 0
    first: tuple[float, int] = (0.0, 0)
    """Time and steps done at the first report of the current activity."""

    def begin(self, now: float, done: int) -> None:
        self.tenth, self.first = 0, (now, done)

    def event(self, now: float, event: Literal["start", "progress"]) -> Event:
        known, counts = facts(self.text), self.total > 1
        return Event(
            event,
            self.job.id,
            self.job.kind,
            self.title,
            known.activity,
            self.done if counts else None,
            self.total if counts else None,
            known.loss,
            known.rows_per_second,
            self._seconds_left(now) if counts else None,
            round(now - self.started, 1),
        )

    def _seconds_left(self, now: float) -> float | None:
        since, before = self.first
        if self.done <= before:
            return None
        return round((self.total - self.done) * (now - since) / (self.done - before), 1)


class Log:
    """Writes an event for the start of a job, every tenth of it, at least one per minute, and one
    at its end."""

    def __init__(
        self, write: Callable[[Event], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.write, self.clock = write, clock
        self.jobs: dict[str, _State] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Start the reminders about jobs that report nothing, such as while loading a model."""
        threading.Thread(target=self._remind, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def at(self, job: Job, title: str, text: str, done: int, total: int) -> None:
        """Record the progress of a job."""
        with self._lock:
            now = self.clock()
            state = self._state(job, title, text, done, total, now)
            tenth = 10 * done // max(total, 1)
            same = facts(text).activity == facts(state.text).activity
            if total != state.total or done < state.done or not same:
                state.begin(now, done)  # the next part of the job counts from 0 again
            state.text, state.done, state.total = text, done, total
            if total > 1 and tenth > state.tenth and now - state.logged >= _BUSY_SECONDS:
                state.tenth = tenth
                self._log(state, now)

    def _state(self, job: Job, title: str, text: str, done: int, total: int, now: float) -> _State:
        if job.id not in self.jobs:
            state = self.jobs[job.id] = _State(job, title, now, now, text, done, total)
            state.begin(now, done)
            self.write(state.event(now, "start"))
        return self.jobs[job.id]

    def ended(self, job: Job, title: str, kind: str) -> None:
        """Record the end of a job; `kind` is `ok` or an exit class."""
        with self._lock:
            now, state = self.clock(), self.jobs.pop(job.id, None)
            seconds = round(now - state.started, 1) if state else 0.0
            self.write(Event("end", job.id, job.kind, title, seconds=seconds, exit=kind))

    def remind(self) -> None:
        """Log every job that has been silent for a minute."""
        with self._lock:
            now = self.clock()
            for state in self.jobs.values():
                if now - state.logged >= _QUIET_SECONDS:
                    self._log(state, now)

    def _log(self, state: _State, now: float) -> None:
        state.logged = now
        self.write(state.event(now, "progress"))

    def _remind(self) -> None:
        while not self._over.wait(1.0):
            self.remind()


class JsonLines(io.TextIOBase):
    """A text stream that writes every line as a JSON object: `{"time", "event": "note", "text"}`.

    It takes the place of stderr, so that notes and errors are JSON as well.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._lock, self._rest = stream, threading.Lock(), ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self.note(line)
        return len(text)

    def note(self, line: str) -> None:
        """Write a line; of one that was written over itself, as a progress bar, the last state."""
        if shown := clean(line.rstrip("\r").rpartition("\r")[2]).strip():
            self.put({"event": "note", "text": shown})

    def put(self, entry: dict[str, Any]) -> None:
        """Write one object, with the time."""
        stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        with self._lock:
            self.stream.write(json.dumps(stamped) + "\n")
            self.stream.flush()

    def put_event(self, event: Event) -> None:
        self.put(asdict(event))


def use_json() -> None:
    """Write everything that this process, and those that it starts, say on stderr as JSON lines
    from now on, also what libraries write past Python."""
    stream = sys.stderr
    sys.stderr = lines = JsonLines(stream)
    with contextlib.suppress(OSError, ValueError):
        descriptor = stream.fileno()
        lines.stream = os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
        _collect(descriptor, lines)


def _collect(descriptor: int, lines: JsonLines) -> None:
    """Put a pipe in the place of a stream, and write what comes through it until this process ends.
    (Others may have it open even then, so its end is a line.)"""
    read, write = os.pipe()
    os.dup2(write, descriptor)
    last = secrets.token_hex(16).encode()

    def forward() -> None:
        with os.fdopen(read, "rb") as pipe:
            for line in pipe:
                whole, *end = line.split(last)
                lines.note(whole.decode(errors="replace").rstrip("\n"))
                if end:
                    return

    def finish() -> None:
        os.write(write, last + b"\n")
        thread.join(10)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    atexit.register(finish)
