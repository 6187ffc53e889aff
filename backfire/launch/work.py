"""The loop of a worker: take the next job that is ready, run it, write how it ended, until nothing
is left. Any number of workers, on any hosts, do this at once; no other code knows the graph.

The files of the run folder decide: a job has ended if its result or its failure is there, and a
worker has it if it holds its claim. Nothing waits for a lock: a job that needs a stage which
another process builds is put back.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from backfire.claims import MOST_KILLS, Claim, Claims
from backfire.errors import EXIT_CLASSES, Busy, GpuError, Pause, Stopped, UserError
from backfire.experiment import Machine
from backfire.launch import imports
from backfire.launch.board import Board, Taken, Watch
from backfire.launch.job import RunFolder, report, run_job, run_together
from backfire.launch.order import fits
from backfire.launch.stop import Stop
from backfire.model.resident import Resident
from backfire.patience import patiently
from backfire.plan import Job
from backfire.progress import Progress, while_waiting
from backfire.store import Store, cache_root, scratch_root

Run = Callable[[Job, RunFolder, Store, Machine, Progress, Resident], str]
"""Runs a job and writes how it ended, as `run_job`; returns the exit class."""

_SHORTEST, _LONGEST = 0.05, 5.0
"""Seconds between two looks for a job, when none is ready: a fifth of the time waited so far."""


def work(
    jobs: Sequence[Job],
    folder: RunFolder,
    store: Store,
    machine: Machine,
    watch: Watch,
    *,
    stop: Stop | None = None,
    memory: float | None = None,
    stays: bool = True,
    run: Run = run_job,
    begins: Callable[[Job], object] = lambda job: None,
) -> dict[str, str]:
    """Work on the jobs until all have ended, here or elsewhere; returns exit classes by job id.

    Args:
        stop: when to end early; the jobs that are left are not in the result.
        memory: bytes that a job may need; larger ones are left to others.
        stays: wait for the jobs of other workers too. Without it, the worker ends once all that is
            left is held by workers that are alive, or does not fit it.
        run: what runs a job that is not trained together with others.
        begins: called with each job that begins.

    Raises:
        OSError: the run folder cannot be read or written.
        UserError: a disk is full.
    """
    stop, claims = Stop() if stop is None else stop, Claims(folder.path)
    board = Board(jobs, folder, claims, watch)
    store = copy.copy(store)
    store.waits = False
    resident, base, idle, may_begin = Resident(), -1, _Idle(), fits(stop, memory)

    def do(group: Sequence[Job], progresses: Sequence[Progress]) -> list[str | Pause]:
        for job in group:
            begins(job)
        # A job that all others wait for may use their cores.
        share = machine.model_copy(update={"workers": board.beside(group[0], machine.workers)})
        if len(group) > 1:
            return run_together(group, folder, store, share, progresses, resident)
        try:
            return [run(group[0], folder, store, share, progresses[0], resident)]
        except Busy as busy:
            return [busy]

    while board.waiting and not stop:
        taken = patiently(partial(board.take, base, may_begin))
        if taken:
            idle.end()
            claims.leave()
            base = board.bases[taken[0].id]
            others = board.join(*taken, may_begin, machine, memory)
            _do([taken, *others], board, stop, do)
            continue
        idle.begin()
        claims.wait()
        if not board.coming(may_begin):
            resident.release()  # a base in memory that nobody needs
            dead_for = None if stays else idle.seconds
            if not patiently(partial(board.held, dead_for=dead_for)):
                break
        patiently(board.say_what_is_awaited)
        stop.sleep(idle.delay)
    claims.leave()
    imports.release()
    return board.ended


def _do(
    taken: Sequence[Taken],
    board: Board,
    stop: Stop,
    do: Callable[[list[Job], list[Progress]], list[str | Pause]],
) -> None:
    """Run jobs that this worker has claimed, several of them as one, unless they cannot succeed."""

    def look() -> None:
        if stop:
            raise Stopped

    def progress(job: Job, claim: Claim, done: int, total: int, text: str) -> None:
        board.watch(job, text, done, total)
        claim.note(text, done, total)
        look()

    kinds, dies = dict[str, str | None](), False
    try:
        kinds |= {job.id: _hopeless(job, claim, board) for job, claim in taken}
        if left := [(job, claim) for job, claim in taken if kinds[job.id] is None]:
            with while_waiting(look):
                progresses: list[Progress] = [partial(progress, *one) for one in left]
                ends = do([job for job, _ in left], progresses)
            for (job, _), end in zip(left, ends, strict=True):
                kinds[job.id] = end if isinstance(end, str) else board.put(job, end)
            if len(left) > 1:
                board.lone |= {job.id for job, _ in left}
    except Pause:  # this worker stops, or has lost a claim
        pass
    except GpuError:  # by these jobs, it may be: after a few such workers they count as failed
        dies = True
        raise
    finally:
        for _, claim in taken:
            claim.release(dies=dies)
    if "disk-full" in kinds.values():  # the next job would end like this one
        raise UserError(f"{_space(board.folder.path)} {EXIT_CLASSES['disk-full']}")
    for job, _ in taken:
        if kind := kinds[job.id]:
            board.end(job, kind)


def _hopeless(job: Job, claim: Claim, board: Board) -> str | None:
    """Write that a job cannot succeed, if so; returns its exit class."""
    if (kills := claim.holder.kills) >= MOST_KILLS:
        return report(job, board.folder, "killed", f"{kills} workers died with it.")
    bad = board.blocked(job)
    return report(job, board.folder, *bad) if bad else None


def _space(run: Path) -> str:
    """A sentence on a full disk; a quota may be full before it."""
    places = {"the run": run, "the cache": cache_root()}
    if scratch := scratch_root():
        places["BACKFIRE_SCRATCH"] = scratch
    free = []
    for what, place in places.items():
        with suppress(OSError):
            free.append(f"{shutil.disk_usage(place).free / 1e6:,.0f} MB for {what} ({place})")
    return f"The disk is full, or a quota: there are {', '.join(free)}."


class _Idle:
    """How long a worker has had nothing to do."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        self._since = None

    @property
    def seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    @property
    def delay(self) -> float:
        return min(_LONGEST, max(_SHORTEST, self.seconds / 5))
