"""Run jobs on this machine: in turn in this process, or in worker processes.

The files on disk decide: a job without a result has failed.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, cast

from backfire.experiment import Machine
from backfire.launch.job import RunFolder, report, run_job
from backfire.model.resident import Resident
from backfire.plan import Job
from backfire.plugins import Plugin
from backfire.progress import Progress
from backfire.registry import loaded, use
from backfire.resources import cores, has_gpu
from backfire.store import Store

Watch = Callable[[Job, str, int, int], None]
"""Called with a job, its current activity (an exit class at its end), steps done, steps in
total."""


def run(
    jobs: Sequence[Job], folder: RunFolder, store: Store, machine: Machine, watch: Watch
) -> dict[str, str]:
    """Run the jobs that are not done; returns exit classes by job id. Other jobs survive a
    failure."""
    todo = [
        job for job in jobs if not (job.kind == "cell" and folder.done(job.experiment, job.key))
    ]
    needed = {name for job in todo if job.kind == "cell" for name in job.after}
    todo = [job for job in todo if job.kind == "cell" or job.id in needed]
    ended = {job.id: "ok" for job in jobs if job not in todo}
    if machine.workers == 1:
        return _in_turn(todo, folder, store, machine, watch, ended)
    return _side_by_side(todo, folder, store, machine, watch, ended)


def set_threads(machine: Machine) -> None:
    """Divide the cores among the workers: two workers of one thread are faster than one of two.

    `OMP_NUM_THREADS` takes precedence, as users of shared machines expect.
    """
    import torch

    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # may list several levels
    threads = machine.threads or (int(variable) if variable.strip().isdigit() else 0)
    torch.set_num_threads(threads or max(1, cores() // machine.workers))


def _in_turn(
    todo: Sequence[Job],
    folder: RunFolder,
    store: Store,
    machine: Machine,
    watch: Watch,
    ended: dict[str, str],
) -> dict[str, str]:
    set_threads(machine)
    waiting, resident = list(todo), Resident()
    base: object = None
    while waiting:
        ready = _ready(waiting, ended)
        job = next((job for job in ready if job.base == base), ready[0])
        waiting.remove(job)
        base = job.base
        if bad := _blocked(job, ended):
            ended[job.id] = report(job, folder, *bad)
        else:
            progress = _progress_of(watch, job)
            ended[job.id] = run_job(job, folder, store, machine, progress, resident)
        watch(job, ended[job.id], 1, 1)
    return ended


def _ready(waiting: Sequence[Job], ended: Mapping[str, str]) -> list[Job]:
    """The jobs that need no other job any more, in order."""
    return [job for job in waiting if all(name in ended for name in job.after)]


def _progress_of(watch: Watch, job: Job) -> Progress:
    return lambda done, total, text: watch(job, text, done, total)


def _blocked(job: Job, ended: dict[str, str]) -> tuple[str, str] | None:
    """Exit class and message if a stage that this job needs has failed.

    A cell runs anyway, so that it reports the cause.
    """
    if job.kind == "cell":
        return None
    bad = next((name for name in job.after if ended.get(name, "ok") != "ok"), None)
    return (ended[bad], f"The stage {bad} failed.") if bad else None


class _Worker:
    """A process that runs one job after the other. It keeps the base of its last job in memory."""

    def __init__(self, context: Any, folder: RunFolder, store: Store) -> None:
        self.pipe, far = context.Pipe()
        # Plug-ins come first: the other arguments may hold objects of their classes.
        arguments = loaded(), far, folder, store
        self.process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        far.close()
        self.job: Job | None = None
        self.base: object = None

    def begin(self, job: Job, machine: Machine) -> None:
        self.job, self.base = job, job.base
        with contextlib.suppress(OSError):  # it has died, which `_listen` reports
            self.pipe.send((job, machine))

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _side_by_side(
    todo: Sequence[Job],
    folder: RunFolder,
    store: Store,
    machine: Machine,
    watch: Watch,
    ended: dict[str, str],
) -> dict[str, str]:
    # A process forked after CUDA was initialized cannot use it.
    how: Literal["spawn", "forkserver"] = "spawn" if has_gpu() else "forkserver"
    context: Any = multiprocessing.get_context(how)
    context.set_forkserver_preload(["backfire.launch.preload"])
    waiting, workers = list(todo), list[_Worker]()
    try:
        while waiting or any(worker.job for worker in workers):
            idle = [worker for worker in workers if not worker.job]
            for worker in idle:
                if not waiting or not worker.process.is_alive():
                    worker.end()  # a base in memory that nobody needs
                    workers.remove(worker)
            while pair := _next(waiting, ended, workers, machine.workers):
                job, free = pair
                worker = free or _Worker(context, folder, store)
                workers += [] if free else [worker]
                waiting.remove(job)
                # A base is built alone, with all cores: every other job waits for it.
                share = {"workers": 1} if job.kind == "base" else {}
                worker.begin(job, machine.model_copy(update=share))
            busy = [worker for worker in workers if worker.job]
            wait([item for w in busy for item in (w.pipe, w.process.sentinel)], timeout=1.0)
            for worker in busy:
                job = cast(Job, worker.job)
                if (kind := _listen(worker, watch)) is not None:
                    if kind == "killed":
                        sentence = f"The worker died (exit code {worker.process.exitcode})."
                        report(job, folder, kind, sentence)
                    ended[job.id] = kind
                    watch(job, kind, 1, 1)
                    worker.job = None
    finally:
        for worker in workers:
            worker.end()
    return ended


def _next(
    waiting: Sequence[Job], ended: Mapping[str, str], workers: Sequence[_Worker], most: int
) -> tuple[Job, _Worker | None] | None:
    """The next job and the worker to run it: one that holds its base if there is one, else any idle
    one, else a new one (None). None if no job is ready or all workers are busy."""
    idle = [worker for worker in workers if not worker.job]
    ready = _ready(waiting, ended)
    if not ready:
        return None
    pairs = ((job, worker) for job in ready for worker in idle if worker.base == job.base)
    job, free = next(pairs, (ready[0], idle[0] if idle else None))
    busy = len(workers) - len(idle)
    return None if busy >= (1 if job.kind == "base" else most) else (job, free)


def _listen(worker: _Worker, watch: Watch) -> str | None:
    """Forward the worker's messages; returns the exit class of its job once it has ended."""
    assert worker.job
    # Checked before the messages are read, so that none is lost.
    died = not worker.process.is_alive()
    with contextlib.suppress(EOFError, OSError):
        while worker.pipe.poll():
            message = worker.pipe.recv()
            if isinstance(message, str):
                return message
            watch(worker.job, message[2], message[0], message[1])
    if died:
        worker.process.join()
    return "killed" if died else None


def _work(plugins: Sequence[Plugin], pipe: Connection, folder: RunFolder, store: Store) -> None:
    """What a worker does: the jobs that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    # The run has read the data, and said what it leaves out.
    logging.getLogger("backfire.datasets").setLevel(logging.ERROR)
    for plugin in plugins:
        use(plugin)
    resident, last = Resident(), 0.0

    def report_progress(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            send((done, total, text))

    def send(message: object) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:  # the parent is gone; finished work is on disk
            os._exit(1)

    while True:
        try:
            job, machine = pipe.recv()
        except (EOFError, OSError):
            return
        set_threads(machine)
        send(run_job(job, folder, store, machine, report_progress, resident))
