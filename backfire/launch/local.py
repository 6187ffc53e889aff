"""Run jobs on this machine: in turn in this process, or each in a separate worker process.

The files on disk decide: a job without a result has failed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from backfire.experiment import Machine
from backfire.launch.job import RunFolder, report, run_job
from backfire.model.types import has_gpu
from backfire.plan import Job
from backfire.plugins import Plugin
from backfire.progress import Progress
from backfire.registry import loaded, use
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
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // machine.workers))


def _in_turn(
    todo: Sequence[Job],
    folder: RunFolder,
    store: Store,
    machine: Machine,
    watch: Watch,
    ended: dict[str, str],
) -> dict[str, str]:
    set_threads(machine)
    for job in todo:
        if bad := _blocked(job, ended):
            ended[job.id] = report(job, folder, *bad)
        else:
            ended[job.id] = run_job(job, folder, store, machine, _progress_of(watch, job))
        watch(job, ended[job.id], 1, 1)
    return ended


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


@dataclass
class _Worker:
    job: Job
    process: BaseProcess
    pipe: Connection


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
    waiting, running = list(todo), list[_Worker]()
    try:
        while waiting or running:
            for job in [job for job in waiting if all(name in ended for name in job.after)]:
                # A base is built alone, with all cores: every other job waits for it.
                alone = job.kind == "base"
                if len(running) >= (1 if alone else machine.workers):
                    break
                waiting.remove(job)
                share = machine.model_copy(update={"workers": 1}) if alone else machine
                pipe, far = context.Pipe(duplex=False)
                process = context.Process(
                    # Plug-ins come first: the other arguments may hold objects of their classes.
                    target=_child,
                    args=(loaded(), far, job, folder, store, share),
                    daemon=True,
                )
                process.start()
                far.close()
                running.append(_Worker(job, process, pipe))
            wait([item for w in running for item in (w.pipe, w.process.sentinel)], timeout=1.0)
            for worker in list(running):
                if (kind := _listen(worker, watch)) is not None:
                    if kind == "killed":
                        sentence = f"The worker died (exit code {worker.process.exitcode})."
                        report(worker.job, folder, kind, sentence)
                    ended[worker.job.id] = kind
                    watch(worker.job, kind, 1, 1)
                    running.remove(worker)
    finally:
        for worker in running:
            worker.process.terminate()
        for worker in running:
            worker.process.join()
    return ended


def _listen(worker: _Worker, watch: Watch) -> str | None:
    """Forward the worker's messages; returns its exit class once it has ended."""
    # Checked before the messages are read, so that none is lost.
    ended = not worker.process.is_alive()
    kind = None
    with contextlib.suppress(EOFError, OSError):
        while worker.pipe.poll():
            message = worker.pipe.recv()
            if isinstance(message, str):
                kind = message
            else:
                watch(worker.job, message[2], message[0], message[1])
    if kind is not None or ended:
        worker.process.join()
        return kind or "killed"
    return None


def _child(
    plugins: Sequence[Plugin],
    pipe: Connection,
    job: Job,
    folder: RunFolder,
    store: Store,
    machine: Machine,
) -> None:
    for plugin in plugins:
        use(plugin)
    set_threads(machine)
    last = 0.0

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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    send(run_job(job, folder, store, machine, report_progress))
