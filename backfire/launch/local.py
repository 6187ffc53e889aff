"""Start workers on this machine, and watch them: one in this process, or several processes that
keep their base in memory from job to job. What they do is in `launch.work`."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from backfire.claims import MOST_KILLS
from backfire.errors import EXIT_CLASSES, CellError, GpuError, UserError, exit_class
from backfire.experiment import Machine
from backfire.launch.job import RunFolder, run_job
from backfire.launch.stop import Stop
from backfire.launch.work import Run, Watch, needed, work
from backfire.plan import Job
from backfire.plugins import Plugin
from backfire.registry import loaded, use
from backfire.resources import gpus, has_gpu
from backfire.store import Store

logger = logging.getLogger(__name__)

_ENDS = {"ok", *EXIT_CLASSES}
_PATIENCE = 120.0
"""Seconds that a worker has to save a checkpoint when it is told to stop."""


def run(
    jobs: Sequence[Job],
    folder: RunFolder,
    store: Store,
    machine: Machine,
    watch: Watch,
    *,
    stop: Stop | None = None,
    memory: float | None = None,
    stays: bool = True,
    begins: Callable[[Job], object] = lambda job: None,
) -> dict[str, str]:
    """Work on the jobs with `machine.workers` workers; the arguments and the result are those of
    `launch.work.work`. Other jobs survive a failure, and the death of a worker.

    Args:
        begins: called with each job that one of these workers begins.
    """
    stop = Stop() if stop is None else stop
    if machine.workers == 1:
        options: dict[str, Any] = {"stop": stop, "memory": memory, "stays": stays}
        return work(jobs, folder, store, machine, watch, run=_telling(begins), **options)
    team = _Team(jobs, folder, store, machine, watch, memory, stays, begins)
    try:
        try:
            team.run(stop)
        finally:
            team.end(_PATIENCE)
    except KeyboardInterrupt:
        team.end(0.0)
        raise
    return team.ended


def warm_up() -> None:
    """Begin what workers are forked from, whose imports take seconds, in the background."""
    if not has_gpu():
        _forkserver()
        with _without_ctrl_c():
            forkserver.ensure_running()


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backfire.launch.preload"])
    return context


def _telling(begins: Callable[[Job], object]) -> Run:
    """`run_job` that tells of each job when it begins."""

    def run(job: Job, *rest: Any) -> str:
        begins(job)
        return run_job(job, *rest)

    return run


@dataclass
class _Worker:
    """A worker process."""

    process: BaseProcess
    pipe: Connection
    stays: bool
    gpu: str | None
    job: Job | None = None
    """The job that it has."""


@dataclass
class _Team:
    """The worker processes of a run, and what they have told."""

    jobs: Sequence[Job]
    folder: RunFolder
    store: Store
    machine: Machine
    watch: Watch
    memory: float | None
    stays: bool
    begins: Callable[[Job], object]
    ended: dict[str, str] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)
    deaths: int = 0
    """Number of workers that have died since a job ended."""

    def run(self, stop: Stop) -> None:
        """Keep the workers running until all of them have ended by themselves."""
        left = needed(self.jobs, self.folder)
        self.names = {job.id: job for job in self.jobs}
        waiting = {job.id for job in left}  # by id: to compare jobs is slow, and there may be many
        self.ended |= {job.id: "ok" for job in self.jobs if job.id not in waiting}
        count = min(self.machine.workers, len(left))
        for number in range(count):
            self.workers.append(self._start(stop, self.stays and number == 0))
        while self.workers and not stop:
            pipes = [item for w in self.workers for item in (w.pipe, w.process.sentinel)]
            wait(pipes, timeout=0.5)
            for worker in list(self.workers):
                code = worker.process.exitcode  # before the messages are read: none is lost
                self._listen(worker)
                if code is not None:
                    self.workers.remove(worker)
                    worker.pipe.close()
                    if code and len(self.ended) < len(self.jobs):
                        self._died(worker, code)
                        self.workers.append(self._start(stop, worker.stays))

    def end(self, patience: float) -> None:
        """Let the workers save their checkpoints, and end them."""
        for worker in self.workers:
            worker.process.terminate()
        until = time.monotonic() + patience
        while any(w.process.is_alive() for w in self.workers) and time.monotonic() < until:
            for worker in self.workers:  # none may wait for a full pipe
                with contextlib.suppress(UserError):
                    self._listen(worker)
            time.sleep(0.05)
        while self.workers:
            worker = self.workers.pop()
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _start(self, stop: Stop, stays: bool) -> _Worker:
        # A process forked after CUDA was initialized cannot use it.
        context: Any = multiprocessing.get_context("spawn") if has_gpu() else _forkserver()
        pipe, far = context.Pipe()
        # Plug-ins come first: the other arguments may hold objects of their classes.
        arguments = (self.jobs, self.folder, self.store, self.machine)
        gpu = self._free_gpu()
        options = {"memory": self.memory, "stays": stays, "stop": stop}
        process = context.Process(
            target=_work, args=(loaded(), far, gpu, arguments, options), daemon=True
        )
        with _without_ctrl_c():
            process.start()
        far.close()
        return _Worker(process, pipe, stays, gpu)

    def _free_gpu(self) -> str | None:
        """The GPU that the fewest workers have, if there are several to choose from."""
        names = gpus()
        if (
            len(names) < 2
            or self.machine.device not in ("auto", "cuda")
            or self.machine.devices > 1
        ):
            return None
        return min(names, key=[worker.gpu for worker in self.workers].count)

    def _listen(self, worker: _Worker) -> None:
        """Forward the worker's messages."""
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                name, text, done, total = worker.pipe.recv()
                if name is None:
                    raise UserError(text)
                job = self.names[name]
                if text is None:
                    worker.job = job
                    self.begins(job)
                elif text not in _ENDS:
                    self.watch(job, text, done, total)
                else:
                    worker.job = None if worker.job is job else worker.job
                    if name not in self.ended:
                        self.ended[name], self.deaths = text, 0
                        self.watch(job, text, done, total)

    def _died(self, worker: _Worker, code: int) -> None:
        """Tell of a worker that has died; another one takes its job over."""
        if worker.job:
            sentence = "The worker of %s %s died (exit code %d); another one goes on."
            logger.warning(sentence, worker.job.kind, worker.job.title, code)
        self.deaths += 1
        if self.deaths > MOST_KILLS * self.machine.workers:  # not by one of the jobs
            raise CellError("killed", f"One worker after the other died (exit code {code}).")


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C in a terminal is sent to every process. Those that are started here never get it: this
    one ends them."""
    resource_tracker.ensure_running()  # what starts it ends such a block
    former = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(
    plugins: Sequence[Plugin],
    pipe: Connection,
    gpu: str | None,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """What a worker process does."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA reads it when it is first used
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # if another part of the program forks it
    # The run has read the data, and said what it leaves out.
    logging.getLogger("backfire.datasets").setLevel(logging.ERROR)
    for plugin in plugins:
        use(plugin)
    last = 0.0

    def watch(job: Job, text: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            send(job.id, text, done, total)

    def send(*message: object) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:  # the parent is gone; finished work is on disk
            os._exit(1)

    begin = _telling(lambda job: send(job.id, None, 0, 1))
    jobs, folder, store, machine = arguments
    try:
        if machine.device.startswith("cuda"):  # it may be gone since the command began
            from backfire.model.load import device_of

            device_of(machine.device)
        with options["stop"].on_signals():
            work(jobs, folder, store, machine, watch, run=begin, **options)
    except GpuError as error:
        raise SystemExit(f"backfire: {error}") from None  # another process takes its place
    except (UserError, CellError, OSError) as error:
        kind, sentence = exit_class(error)
        if isinstance(error, OSError) and kind == "failed":
            sentence = f"{error.strerror or error} ({error.filename})."
        elif isinstance(error, OSError):  # as `fail_or_raise` in a command
            sentence = f"{sentence} {EXIT_CLASSES[kind]}"
        send(None, sentence, 0, 1)
