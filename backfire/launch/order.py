"""Which jobs of a plan are left, which comes first, and which fit into what a worker has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from backfire.launch.job import RunFolder
from backfire.launch.stop import Stop
from backfire.plan import Job


def needed(jobs: Sequence[Job], folder: RunFolder) -> list[Job]:
    """The jobs to do: cells without a result, and the stages that they need."""
    cells = {
        job.id: job
        for job in jobs
        if job.kind == "cell" and not folder.done(job.experiment, job.key)
    }
    names = {name for job in cells.values() for name in job.after}
    return [job for job in jobs if job.id in (cells if job.kind == "cell" else names)]


def by_urgency(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, those first after which the longest chain of jobs comes, by estimated minutes; so
    every job is after those that it needs."""
    known = [job.minutes for job in jobs if job.minutes]
    unknown = sum(known) / len(known) if known else 1.0
    chain = dict[str, float]()  # job -> minutes from its start to the end of the last after it
    behind = dict[str, float]()  # job -> those without its own
    for job in reversed(jobs):
        chain[job.id] = (job.minutes or unknown) + behind.get(job.id, 0.0)
        for name in job.after:
            behind[name] = max(behind.get(name, 0.0), chain[job.id])
    return sorted(jobs, key=lambda job: -chain[job.id])


def fits(stop: Stop, memory: float | None) -> Callable[[Job], bool]:
    """Whether a job fits into the memory, and into the time that is left by its estimate. One that
    is longer than the worker's whole time is begun in the first half: another worker goes on from
    its checkpoint."""

    def does(job: Job) -> bool:
        if memory is not None and job.memory is not None and job.memory > memory:
            return False
        need, left = 60 * (job.minutes or 0), stop.until - time.monotonic()
        return need <= left or (need > stop.seconds and left > stop.seconds / 2)

    return does
