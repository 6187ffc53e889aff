"""Jobs on this machine: one after another in this process, or each in a process of its own.

The truth is what lies on disk: a job that died is one whose result is missing.
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
from backfire.launch.job import Folder, report, run_job
from backfire.model.types import has_gpu
from backfire.plan import Job
from backfire.plugins import Plugin
from backfire.progress import Progress
from backfire.registry import loaded, use
from backfire.store import Store

Watch = Callable[[Job, str, int, int], None]
"""Called with a job, what it is doing (an exit class once it has ended), and how far it is."""


def run(
    jobs: Sequence[Job], folder: Folder, store: Store, machine: Machine, watch: Watch
) -> dict[str, str]:
    """Run the jobs that are not done; returns job id -> exit class. Failures stop nothing else."""
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
    """Cores are shared out among the workers: two workers of one thread beat one of two.

    `OMP_NUM_THREADS` wins, as users of shared machines expect.
    """
    import torch

    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # may be a list, one a level
    asked = machine.threads or (int(given) if given.strip().isdigit() else 0)
    torch.set_num_threads(asked or max(1, (os.cpu_count() or 1) // machine.workers))


def _in_turn(
    todo: Sequence[Job],
    folder: Folder,
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
            ended[job.id] = run_job(job, folder, store, machine, _telling(watch, job))
        watch(job, ended[job.id], 1, 1)
    return ended


def _telling(watch: Watch, job: Job) -> Progress:
    return lambda done, total, text: watch(job, text, done, total)


def _blocked(job: Job, ended: dict[str, str]) -> tuple[str, str] | None:
    """The failure of a stage this job needs. A cell is tried all the same, to name the cause."""
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
    folder: Folder,
    store: Store,
    machine: Machine,
    watch: Watch,
    ended: dict[str, str],
) -> dict[str, str]:
    # A process that was forked after CUDA had been looked at cannot use it.
    how: Literal["spawn", "forkserver"] = "spawn" if has_gpu() else "forkserver"
    context: Any = multiprocessing.get_context(how)
    context.set_forkserver_preload(["backfire.launch.preload"])
    waiting, running = list(todo), list[_Worker]()
    try:
        while waiting or running:
            for job in [job for job in waiting if all(name in ended for name in job.after)]:
                # A base is built alone, with every core: nothing else could start meanwhile.
                alone = job.kind == "base"
                if len(running) >= (1 if alone else machine.workers):
                    break
                waiting.remove(job)
                share = machine.model_copy(update={"workers": 1}) if alone else machine
                pipe, far = context.Pipe(duplex=False)
                process = context.Process(
                    # Plug-ins first: what comes after them may be of their classes.
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
    """Pass on what the worker says; its exit class once it has ended."""
    ended = (
        not worker.process.is_alive()
    )  # asked first, so that nothing said before the end is lost
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
    folder: Folder,
    store: Store,
    machine: Machine,
) -> None:
    for plugin in plugins:
        use(plugin)
    set_threads(machine)
    last = 0.0

    def say(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            tell((done, total, text))

    def tell(message: object) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:  # the parent is gone; what was done is on disk
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    tell(run_job(job, folder, store, machine, say))
