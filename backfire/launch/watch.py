"""Watches workers on other machines, and keeps enough of them while there is work.

What is done is read from the run folder; the scheduler is only asked how many workers it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from backfire.claims import MOST_KILLS
from backfire.errors import UserError
from backfire.launch.board import Board
from backfire.launch.remote import FOLDER, Probe, forget_refusals, last_line, refusals
from backfire.launch.stop import Stop

POLL = 1.0
"""Least number of seconds between two looks at the run folder."""
ASK = 10.0
"""Number of seconds between two questions to the scheduler."""
_SILENCE = 600.0
"""Seconds without an answer after which a scheduler that has nobody at work is given up, and a run
folder that cannot be read."""


WAITS = "pending"
"""How the state of a worker begins that has not been started."""
_HOSTS = 2
"""Number of machines on which workers must refuse before those that wait are not started."""


class Launcher(Protocol):
    """Starts workers on the machines of a scheduler."""

    name: str

    def check(self) -> None:
        """Ask the scheduler whether it would start such workers; nothing is started or written.

        Raises:
            UserError: it refuses, or does not answer.
        """

    def unread(self, probes: Sequence[Probe]) -> tuple[str, Probe] | None:
        """A machine, and one of these files that it does not read; None if there is no such one, or
        if no machine is free to look now (each worker looks again).

        Raises:
            UserError: a machine cannot run workers.
        """

    def begin(self, options: tuple[str, ...], probe: Probe) -> None:
        """Say what its workers will do: options of `backfire work`, and how they know the cache."""

    def start(self, count: int) -> list[str]:
        """Start so many workers; returns their ids.

        Raises:
            UserError: the scheduler refuses.
        """

    def alive(self) -> dict[str, str]:
        """Its workers for this run that work or wait, also those of a former command: id -> what
        the scheduler says.

        Raises:
            ConnectionError: it does not answer.
        """

    def end_of(self, worker: str) -> str:
        """How a worker ended that is not alive any more, in a word or two."""

    def log_of(self, worker: str) -> str:
        """Name of a worker's log."""

    def cancel(self, say: Callable[[str], None]) -> None:
        """End all workers. If that takes long, a sentence says why."""

    def goes_on(self, say: Callable[[str], None]) -> str:
        """What to tell after Ctrl-C: whether the workers go on; if they do not, they are ended."""


class View(Board):
    """What is left of a plan, for one who only watches."""

    def refresh(self) -> int:
        """Read what has ended and what others do; returns how many jobs have ended since."""
        before = len(self.ended)
        self._look()
        with suppress(FileNotFoundError):
            there = {place.name for place in (self.folder.path / "cells").iterdir()}
            for job in list(self.waiting.values()):
                if job.kind == "cell" and self.folder.cell(job.experiment, job.key).name in there:
                    self._has_ended(job)
        # Workers of a former command know of stages that ended before this round began.
        cells = [job for job in self.waiting.values() if job.kind == "cell"]
        needed = {name for job in cells for name in (job.id, *job.after)}
        for job in [job for job in self.waiting.values() if job.id not in needed]:
            self.end(job, "ok")
        self.say_what_is_awaited()
        return len(self.ended) - before

    def num_free(self) -> int:
        """Number of jobs that are left, and that no living worker has."""
        held = {holder.job for holder in self.claims.holders() if not holder.is_stale}
        return len(self.waiting.keys() - held)


def follow(
    view: View,
    launcher: Launcher,
    count: int,
    say: Callable[[str], None],
    stop: Stop,
    *,
    ask: float = ASK,
) -> None:
    """Watch until all jobs have ended or until `stop`, with up to `count` workers at work.

    Raises:
        UserError: the scheduler refuses, or the workers do, on all machines that have tried; or one
            worker after the other ends before a job does.
        OSError: the run folder cannot be read for minutes.
    """
    forget_refusals(view.folder.path)
    crew, asked, read = _Crew(view, launcher, count, say), float("-inf"), time.monotonic()
    while view.waiting and not stop:
        begun = time.monotonic()
        try:
            if view.refresh():
                crew.restarts = min(crew.restarts, 0)
            crew.hear()
            read = begun
            if view.waiting and begun - asked >= ask:
                asked = begun
                crew.fill()
        except OSError:  # a shared disk may be away for a while; the workers wait for it too
            if begun - read > _SILENCE:
                raise
        stop.sleep(max(min(POLL, ask), 10 * (time.monotonic() - begun)))


class _Crew:
    """The workers that a scheduler has for a run."""

    def __init__(
        self, view: View, launcher: Launcher, count: int, say: Callable[[str], None]
    ) -> None:
        self.view, self.launcher, self.count, self.say = view, launcher, count, say
        self.alive: dict[str, str] = {}
        self.last = "", ""
        """The last worker that ended, and how."""
        self.restarts = -count
        """Number of workers that were started, beyond the first ones, since a job ended."""
        self._sign, self._is_silent = time.monotonic(), False
        """When the scheduler last answered, or a worker was at work."""
        self._first = True
        self.refused: dict[str, tuple[str, str]] = {}
        """Workers that refused to work: host and sentence."""

    def hear(self) -> None:
        """Tell of workers that refused to work. One is not replaced: the scheduler would start the
        next one on the same machine, which is free."""
        found = refusals(self.view.folder.path)
        new = [found[name] for name in found.keys() - self.refused.keys()]
        self.refused = found
        for _, sentence in new:
            self.say(f"A worker does not work, and is not replaced. {sentence}")

    def fill(self) -> None:
        """Start workers for those that have ended, if there are jobs for them."""
        try:
            alive = self.launcher.alive()
        except ConnectionError as error:
            self._silent(str(error))
            return
        self._sign, self._is_silent = time.monotonic(), False
        if self._first and alive:
            self.say(f"{_workers(len(alive))} of this run {_are(alive)} in {self.launcher.name}.")
            self.restarts = 0
        self._first = False
        for worker in self.alive:
            if worker not in alive:
                self.last = worker, self.launcher.end_of(worker)
                self.say("Worker {} ended: {}.".format(*self.last))
        self._say_why_they_wait(alive)
        self.alive = alive
        self._refuse(alive)
        missing = min(self.count - len(self.refused) - len(alive), self.view.num_free())
        if missing <= 0:
            return
        if self.restarts >= MOST_KILLS * self.count:
            raise UserError(self._in_vain())
        self.restarts += missing
        self.alive = {**alive, **dict.fromkeys(self.launcher.start(missing), "new")}
        self.say(f"{_workers(missing)} started in {self.launcher.name}.")

    def _refuse(self, alive: dict[str, str]) -> None:
        """Give up once all workers have refused, or those of several machines, and the others only
        wait to be started: the reason is then the run's."""
        hosts = {host for host, _ in self.refused.values()}
        if len(self.refused) < self.count and len(hosts) < _HOSTS:
            return
        if all(state.startswith(WAITS) for state in alive.values()):
            raise UserError([sentence for _, sentence in self.refused.values()][-1])

    def _silent(self, reason: str) -> None:
        if any(not holder.is_stale for holder in self.view.claims.holders()):
            self._sign = time.monotonic()
        if (silent := time.monotonic() - self._sign) > _SILENCE:
            raise UserError(
                f"{self.launcher.name} has not answered for {silent / 60:.0f} minutes ({reason}), "
                "and no worker was at work; run the same command again later."
            )
        if not self._is_silent:
            self.say(f"{self.launcher.name} does not answer ({reason}); it is asked again.")
        self._is_silent = True

    def _say_why_they_wait(self, alive: dict[str, str]) -> None:
        """A line when what the scheduler says of its workers has changed."""
        states = sorted(alive.values())
        if states != sorted(self.alive.values()):
            counts = {state: states.count(state) for state in states}
            listed = ", ".join(f"{number} {state}" for state, number in counts.items())
            self.say(f"{self.launcher.name}: {listed or 'no worker'}.")

    def _in_vain(self) -> str:
        worker, how = self.last
        log = self.view.folder.path / FOLDER / self.launcher.log_of(worker)
        if log.is_file():
            why = f"its log {log} ends with: {last_line(log) or 'nothing'}"
        else:
            why = f"there is no {log}; is the run folder on a disk that all machines share?"
        return f"One worker after the other ended before a job did; the last one: {how}; {why}"


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number != 1)}"


def _are(alive: dict[str, str]) -> str:
    return "is" if len(alive) == 1 else "are"
