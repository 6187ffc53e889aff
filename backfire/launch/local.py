"""Start workers on this machine, and watch them: one in this process, or several processes that
keep their base in memory from job to job. What they do is in `launch.work`."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from backfire.claims import MOST_KILLS
from backfire.data.weights import first_line
from backfire.errors import (
    EXIT_CLASSES,
    CellError,
    GpuError,
    UserError,
    exit_class,
    is_out_of_memory,
)
from backfire.experiment import Machine
from backfire.launch.board import Watch
from backfire.launch.job import RunFolder, run_job
from backfire.launch.order import needed
from backfire.launch.stop import Stop
from backfire.launch.work import work
from backfire.patience import LONGEST
from backfire.plan import Job
from backfire.plugins import Plugin
from backfire.registry import loaded, use
from backfire.resources import gpus, has_gpu
from backfire.signals import TO_STOP, held_back, let_in
from backfire.store import Store

logger = logging.getLogger(__name__)

_ENDS = {"ok", *EXIT_CLASSES}
_BROKEN_GPU = 75
"""Exit code of a worker whose GPU does not answer: "try again later" in `sysexits.h`."""
_MOST_FAULTS = 2
"""Number of workers in a row whose GPU does not answer before it is left out. After one, the job
may be at fault: it breaks the process and not the GPU."""
_PATIENCE = LONGEST + 60.0
"""Seconds that a worker has to save a checkpoint when it is told to stop; it may wait for a file
system meanwhile."""


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
        return work(jobs, folder, store, machine, watch, run=run_job, begins=begins, **options)
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
        with _without_signals():
            forkserver.ensure_running()


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backfire.launch.preload"])
    return context


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
    faults: Counter[str] = field(default_factory=Counter)
    """GPU -> number of workers for which it did not answer, since a job ended on it."""
    nobody_stays: bool = False
    """Whether the worker that was to stay had a GPU that is left out."""

    def run(self, stop: Stop) -> None:
        """Keep the workers running until all of them have ended by themselves."""
        left = needed(self.jobs, self.folder)
        self.names = {job.id: job for job in self.jobs}
        waiting = {job.id for job in left}  # by id: to compare jobs is slow, and there may be many
        self.ended |= {job.id: "ok" for job in self.jobs if job.id not in waiting}
        count = min(self.machine.workers, len(left))
        for number in range(count):
            self._start(stop, self.stays and number == 0)
        while self.workers and not stop:
            pipes = [item for w in self.workers for item in (w.pipe, w.process.sentinel)]
            wait(pipes, timeout=0.5)
            for worker in list(self.workers):
                code = worker.process.exitcode  # before the messages are read: none is lost
                self._listen(worker)
                if code is not None:
                    self.workers.remove(worker)
                    worker.pipe.close()
                    if len(self.ended) < len(self.jobs):
                        self._replace(worker, code, stop)

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

    def _replace(self, worker: _Worker, code: int, stop: Stop) -> None:
        """Start another worker for one that has died, unless its GPU is left out from now on; or
        for one that has left, if the one that was to stay had such a GPU.

        Raises:
            GpuError: no GPU is left.
        """
        if code:
            self._died(worker, code)
        elif not self.nobody_stays:
            return
        if worker.gpu is not None and code == _BROKEN_GPU:
            self.faults[worker.gpu] += 1
        stays, self.nobody_stays = worker.stays or self.nobody_stays, False
        if worker.gpu is None or self.faults[worker.gpu] < _MOST_FAULTS:
            self._start(stop, stays)
            return
        logger.warning("GPU %s does not answer; it is left out.", worker.gpu)
        if self.workers:
            self.nobody_stays = stays
        elif self._good_gpus():  # their workers have left, since this one was to stay
            self._start(stop, stays)
        else:
            raise GpuError(
                f"No GPU of {os.uname().nodename} answers any more. Finished work is kept; run the "
                "same command again, or on another machine."
            )

    def _start(self, stop: Stop, stays: bool) -> None:
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
        with _without_signals():
            process.start()
        far.close()
        self.workers.append(_Worker(process, pipe, stays, gpu))

    def _free_gpu(self) -> str | None:
        """The GPU that the fewest workers have, if there are several to choose from."""
        names = gpus()
        if (
            len(names) < 2
            or self.machine.device not in ("auto", "cuda")
            or self.machine.devices > 1
        ):
            return None
        return min(self._good_gpus(), key=[worker.gpu for worker in self.workers].count)

    def _good_gpus(self) -> list[str]:
        """The GPUs that are not left out."""
        return [name for name in gpus() if self.faults[name] < _MOST_FAULTS]

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
                        if worker.gpu is not None:
                            self.faults[worker.gpu] = 0
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
def _without_signals() -> Iterator[None]:
    """Terminals and schedulers send a signal to every process. Those that are started here do not
    get it, as the server of workers must outlast them; only workers let in what tells to stop."""
    with held_back(signal.SIGUSR1):  # it ignores the others itself
        resource_tracker.ensure_running()  # what starts it lets them in
    with held_back(signal.SIGINT, *TO_STOP):
        yield


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
    last: dict[str, float] = {}

    def watch(job: Job, text: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - last.get(job.id, -1.0) > 0.2:
            last[job.id] = time.monotonic()
            send(job.id, text, done, total)

    def send(*message: object) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:  # the parent is gone; finished work is on disk
            os._exit(1)

    def begin(job: Job) -> None:
        send(job.id, None, 0, 1)

    jobs, folder, store, machine = arguments
    try:
        if machine.device.startswith("cuda"):  # it may be gone since the command began
            _check_device(machine.device, gpu)
        with options["stop"].on_signals(), let_in(*TO_STOP):
            work(jobs, folder, store, machine, watch, run=run_job, begins=begin, **options)
    except GpuError as error:  # another process takes its place
        sys.stderr.write(f"backfire: {error}\n")
        raise SystemExit(_BROKEN_GPU) from None
    except (UserError, CellError, OSError) as error:
        kind, sentence = exit_class(error)
        if isinstance(error, OSError) and kind == "failed":
            sentence = f"{error.strerror or error} ({error.filename})."
        elif isinstance(error, OSError):  # as `fail_or_raise` in a command
            sentence = f"{sentence} {EXIT_CLASSES[kind]}"
        send(None, sentence, 0, 1)


def _check_device(device: str, gpu: str | None) -> None:
    """Compute something on the device.

    Raises:
        UserError: it is not there, or does not answer; a `GpuError` if it is one of several, as the
            others may do.
    """
    import torch

    from backfire.model.load import device_of

    try:
        torch.zeros(1, device=device_of(device))
    except (UserError, RuntimeError) as error:
        if is_out_of_memory(error):  # by another process; a job says it better
            return
        if gpu is None:
            raise UserError(first_line(error)) from None
        raise GpuError(f"GPU {gpu} does not answer: {first_line(error)}") from None
