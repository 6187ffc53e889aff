"""What a worker knows of a plan: which jobs are left, which may begin, and which others have."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from backfire.claims import Claim, Claims, is_here
from backfire.errors import Away, Busy, Pause
from backfire.experiment import Machine
from backfire.launch.folder import JOBS
from backfire.launch.job import RunFolder, report
from backfire.launch.order import by_urgency, needed
from backfire.launch.together import chosen, most
from backfire.patience import patiently
from backfire.plan import Job

Watch = Callable[[Job, str, int, int], None]
"""Called with a job, its current activity (an exit class at its end), steps done, steps in
total. It may be called for the end of a job that another worker has done."""
Taken = tuple[Job, Claim]
"""A job that this worker has claimed."""

_FRESH = 1.0
"""Seconds for which a worker that finds jobs does not look what others do."""
MOST_TRIES = 3
"""Number of times that a file system or a server does not answer to a job before it counts as
failed."""


class Board:
    """What is left of a plan, as far as a worker knows."""

    def __init__(
        self, jobs: Sequence[Job], folder: RunFolder, claims: Claims, watch: Watch
    ) -> None:
        self.folder, self.claims, self.watch = folder, claims, watch
        plan = folder.path / JOBS
        self.since = patiently(lambda: plan.stat().st_mtime if plan.exists() else claims.now())
        """When this round began, by the clock of the file system."""
        self._jobs = {job.id: job for job in jobs}
        left = by_urgency(needed(jobs, folder))
        self.waiting = {job.id: job for job in left}
        self.ended = {job.id: "ok" for job in jobs if job.id not in self.waiting}
        self.tries = Counter[str]()
        """How often a file system or a server did not answer while this worker had a job."""
        self.put_back: dict[str, Busy] = {}
        """Jobs that need a stage which another process builds; tried again after the others."""
        self.lone = set[str]()
        """Jobs that were put back from a group, and run alone from now on."""
        distinct: list[Any] = []
        self.bases = {job.id: _number(job.base, distinct) for job in left}
        """Equal numbers for jobs that can use the same base in memory."""
        self._needs = {job.id: {n for n in job.after if n not in self.ended} for job in left}
        """What each job still waits for."""
        self._after: dict[str, list[str]] = {}
        for name, needs in self._needs.items():
            for other in needs:
                self._after.setdefault(other, []).append(name)
        self._by_rank, self._rank = left, {job.id: rank for rank, job in enumerate(left)}
        self._ready: dict[int, list[int]] = {base: [] for base in self.bases.values()}
        """Base -> the ranks of the jobs that wait for nothing, the most urgent first."""
        self._add(name for name, needs in self._needs.items() if not needs)
        self._held: set[str] = set()
        self._looked = -math.inf

    def take(self, base: int, fits: Callable[[Job], bool]) -> Taken | None:
        """Claim the most urgent job: one that uses this base, if there is any; a stale claim last.
        None if no job can be had now."""
        is_old = time.monotonic() - self._looked > _FRESH
        if is_old:
            self._look()
        taken = self._take(base, fits)
        if taken is None and not is_old:
            self._look()
            taken = self._take(base, fits)
        return taken

    def _take(self, base: int, fits: Callable[[Job], bool]) -> Taken | None:
        own = list(self._ready.get(base, ()))
        others = heapq.merge(*(list(some) for key, some in self._ready.items() if key != base))
        ranks = itertools.chain(own, others)
        ready = (job for rank in ranks if (job := self._by_rank[rank]).id not in self._held)
        stale = (self.waiting[name] for name in self._held if name in self.waiting)
        free = (job for job in itertools.chain(ready, stale) if self._may_begin(job, fits))
        return next(self._claimed(free), None)

    def _may_begin(self, job: Job, fits: Callable[[Job], bool]) -> bool:
        return not self._needs[job.id] and job.id not in self.put_back and fits(job)

    def _claimed(self, jobs: Iterable[Job]) -> Iterator[Taken]:
        """Claim these jobs one after the other; those that another worker has are left out."""
        for job in jobs:
            if job.id not in self._held and self._has_ended(job):
                continue
            claim = self.claims.take(job.id, f"{job.kind} {job.title}", self.since)
            if claim and self._has_ended(job):  # just before the claim
                claim.release()
            elif claim:
                yield job, claim

    def join(
        self,
        job: Job,
        claim: Claim,
        fits: Callable[[Job], bool],
        machine: Machine,
        memory: float | None,
    ) -> list[Taken]:
        """Claim the jobs to train together with this one. One with which a worker died, or that was
        put back from a group, runs alone."""
        if most(job, machine) == 1 or claim.holder.kills or job.id in self.lone:
            return []
        without = self._held | self.lone | {job.id}
        ranks = list(self._ready[self.bases[job.id]])
        ready = (other for rank in ranks if (other := self._by_rank[rank]).id not in without)
        free = (other for other in ready if self._may_begin(other, fits))
        joined = list[Taken]()
        with suppress(OSError):  # those that are claimed by then
            workers = self.claims.free_workers(machine.workers)
            joined.extend(self._claimed(chosen(job, free, machine, workers, memory)))
        return joined

    def put(self, job: Job, pause: Pause) -> str | None:
        """Put a job back. What does not answer passes, or it does not: after a few times the job
        has failed, and its exit class is returned."""
        if isinstance(pause, Busy):
            self.put_back[job.id] = pause
        if not isinstance(pause, Away):
            return None
        self.tries[job.id] += 1
        too_often = self.tries[job.id] == MOST_TRIES
        return report(job, self.folder, pause.kind, str(pause)) if too_often else None

    def end(self, job: Job, kind: str) -> None:
        """Note that a job has ended."""
        if self.waiting.pop(job.id, None):
            with suppress(ValueError):  # by another worker, before this one saw that it could begin
                self._ready[self.bases[job.id]].remove(self._rank[job.id])
            self.put_back.pop(job.id, None)
            for name in self._after.get(job.id, ()):
                self._needs[name].discard(job.id)
            self._add(name for name in self._after.get(job.id, ()) if not self._needs[name])
        self.ended[job.id] = kind
        self.watch(job, kind, 1, 1)

    def _add(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.waiting:
                insort(self._ready[self.bases[name]], self._rank[name])

    def blocked(self, job: Job) -> tuple[str, str, str | None] | None:
        """How a stage that this job needs has failed: exit class, message, traceback."""
        bad = next((name for name in job.after if self.ended.get(name, "ok") != "ok"), None)
        if bad is None:
            return None
        unknown = self.ended[bad], f"The stage {bad} failed.", None
        return self.folder.ended(self._jobs[bad], self.since) or unknown

    def beside(self, job: Job, most: int) -> int:
        """Number of jobs of the plan that can run at once while this one does, itself included; at
        most `most`. The same whenever it runs, since threads change sums by rounding."""
        others = (
            other
            for other in self._jobs.values()
            if other is not job and other.id not in job.after and job.id not in other.after
        )
        return 1 + sum(1 for _ in itertools.islice(others, most - 1))

    def coming(self, fits: Callable[[Job], bool]) -> bool:
        """Whether there may be a job for this worker later: one that nobody has, and that needs
        only what somebody does."""
        begun = set(self.ended) | self._held
        free = (job for job in self.waiting.values() if job.id not in self._held and fits(job))
        return any(begun.issuperset(job.after) for job in free)

    def held(self, *, dead_for: float | None = None) -> bool:
        """Whether other workers have jobs that are left; with `dead_for`, only workers that gave no
        sign of life for so many seconds count."""
        mine = self._held & self.waiting.keys()
        if dead_for is None:
            return bool(mine)
        now = self.claims.now()
        holders = (self.claims.read(job, now) for job in mine)
        return any(not is_here(one) and one.age >= dead_for for one in holders if one)

    def say_what_is_awaited(self) -> None:
        """Show what this worker waits for."""
        for name, busy in self.put_back.items():
            self.watch(self.waiting[name], f"waiting for {busy}", 0, 1)
        self.put_back.clear()
        now = self.claims.now()
        for name in self._held & self.waiting.keys():
            holder = self.claims.read(name, now)
            if holder and not is_here(holder):
                text = f"{holder.activity or 'running'} on {holder.host}"
                self.watch(self.waiting[name], text, holder.done, holder.total)

    def _has_ended(self, job: Job) -> bool:
        outcome = self.folder.ended(job, self.since)
        if outcome:
            self.end(job, outcome.kind)
        return outcome is not None

    def _look(self) -> None:
        """Learn which jobs others have, and which stages have ended: a list of names each."""
        with suppress(FileNotFoundError):
            for file in [entry.name for entry in os.scandir(self.folder.stages)]:
                if job := self.waiting.get(file.removesuffix(".json")):
                    self._has_ended(job)
        self._held = self.claims.names()
        self._looked = time.monotonic()


def _number(base: Any, distinct: list[Any]) -> int:
    if base not in distinct:
        distinct.append(base)
    return distinct.index(base)
