"""The processes of a training run on several devices: starts them, and hands each its task.

The worker is rank 0. It starts the other ranks as processes of its own, or torchrun or `accelerate
launch` has started them. They wait for tasks, train along, and write nothing. For each task all
ranks join a new process group, so that nothing of a failed one is left.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import pickle
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

from backfire.errors import CellError, exit_class
from backfire.progress import Progress, silent
from backfire.train.devices import OUT_OF_MEMORY, check, launched

if TYPE_CHECKING:
    import torch

    from backfire.experiment import Machine
    from backfire.model.resident import Resident
    from backfire.train.finetune import Task
    from backfire.train.ranks import Ranks

_TIMEOUT = timedelta(minutes=30)
"""Longest time that ranks wait for one another, such as for a checkpoint."""
_LOST = re.compile(r"gloo|nccl|\bpeer\b|process group|socket|timed? ?out", re.IGNORECASE)
"""Messages of torch.distributed after another rank has left."""
_HOST = "127.0.0.1"

Blob = bytes


def train(task: Task, resident: Resident, progress: Progress) -> dict[str, Any]:
    """Train on all devices of the task's machine and return the summary. If memory runs out where
    no rank can repeat a pass alone, all start again from the last checkpoint, with half the rows.

    Raises:
        CellError: a rank has failed, was killed (`killed`), or runs out of memory at one row
            (`oom`).
        UserError: a device is missing.
    """
    check(task.machine)
    rows = math.ceil(task.experiment.train.batch_size / task.machine.devices)
    rows = min(rows, task.machine.micro_batch or rows)
    while True:
        try:
            return _train(task, resident, progress)
        except CellError as error:
            if str(error) != OUT_OF_MEMORY or rows == 1:
                raise
        rows = math.ceil(rows / 2)
        progress(0, 1, f"out of memory; again with {rows} rows per pass")
        task = replace(task, machine=task.machine.model_copy(update={"micro_batch": rows}))


def _train(task: Task, resident: Resident, progress: Progress) -> dict[str, Any]:
    team = _team_of(task.machine.devices)
    try:
        return team.train(task, resident, progress)
    except BaseException as error:
        cause = team.cause(error) if isinstance(error, Exception) else None
        if team.processes:  # those of a launcher stay, and join the next process group
            _disband()
        if cause:
            raise cause from error
        raise


class _Team:
    """Rank 0's view of the other ranks."""

    def __init__(self, store: Any, size: int, processes: list[subprocess.Popen[bytes]]) -> None:
        """`processes`: ranks 1 and up, if this process started them."""
        self.store, self.size, self.processes = store, size, processes
        self.number = 0

    def train(self, task: Task, resident: Resident, progress: Progress) -> dict[str, Any]:
        import torch

        from backfire.registry import loaded

        self.number += 1
        before = torch.get_num_threads()
        threads = max(1, before // self.size) if self.processes else before
        # Plug-ins come first: the task may hold objects of their classes.
        self._send(pickle.dumps((loaded(), pickle.dumps((task, threads)))))
        torch.set_num_threads(threads)
        try:
            with _joined(self.store, self.number, 0, self.size, task, self._check) as ranks:
                return task.train(ranks, resident, progress)
        finally:
            torch.set_num_threads(before)

    def _send(self, blob: Blob) -> None:
        if not self.processes:
            self.store.set(f"task {self.number}", blob)
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, which `_check` reports
                process.stdin.write(len(blob).to_bytes(8, "little") + blob)
                process.stdin.flush()

    def _check(self) -> None:
        """Raise the error of a rank that has left."""
        if error := self._found():
            raise error

    def _found(self) -> CellError | None:
        for rank in range(1, self.size):
            if self.store.check([key := _error(self.number, rank)]):
                kind, sentence, is_effect = json.loads(self.store.get(key))
                if not is_effect:
                    return CellError(kind, sentence)
            elif self.processes and (code := self.processes[rank - 1].poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                return CellError("killed", f"Rank {rank} of {self.size} {how} while training.")
        return None

    @property
    def is_whole(self) -> bool:
        """Whether no rank that this process started has ended."""
        return all(process.poll() is None for process in self.processes)

    def cause(self, error: Exception) -> CellError | None:
        """Why another rank has left, if this error is only the effect of that."""
        if not _is_lost(error):
            return None
        end = time.monotonic() + 5
        while time.monotonic() < end:
            with suppress(RuntimeError):  # the store is gone too
                if found := self._found():
                    return found
            time.sleep(0.05)
        return CellError("killed", "Another rank ended while training, or did not answer.")

    def end(self) -> None:
        """End the other ranks."""
        if not self.processes:
            with suppress(RuntimeError):
                self.store.set(f"task {self.number + 1}", b"")
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()


_team: _Team | None = None
"""The ranks of this worker, kept from job to job."""


def _team_of(size: int) -> _Team:
    global _team
    if _team and not (_team.size == size and _team.is_whole):
        _disband()
    if _team is None:
        _team = _Team(_meet()[0], size, []) if launched() else _started(size)
        atexit.register(_disband)
    return _team


def _disband() -> None:
    global _team
    atexit.unregister(_disband)
    if _team:
        _team.end()
    _team = None


def _started(size: int) -> _Team:
    """Start the other ranks on this machine."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    command = [sys.executable, "-m", __name__, str(store.port), str(size)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # Ctrl-C is for rank 0
        )
        for rank in range(1, size)
    ]
    return _Team(store, size, processes)


@contextmanager
def _joined(
    store: Any, number: int, rank: int, size: int, task: Task, check: Callable[[], None]
) -> Iterator[Ranks]:
    """A process group of all ranks for a task, after checking that each has its own device.

    Raises:
        CellError: two ranks have the same GPU.
    """
    import torch.distributed as dist

    from backfire.train.ranks import Ranks

    device = _device(task.machine, rank)
    store.set(f"place {number} {rank}", json.dumps(_place(device)))
    keys = [f"place {number} {other}" for other in range(size)]
    while not store.check(keys):
        check()
        time.sleep(0.02)
    places = [json.loads(store.get(key)) for key in keys]
    gpus = [(host, gpu) for host, gpu, _ in places if gpu]
    if len(set(gpus)) < len(gpus):
        raise CellError("failed", f"Two of the {size} ranks have the same GPU.")
    hosts = list(dict.fromkeys(host for host, _, _ in places))
    if len(hosts) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"group {number}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        # Host names are nobody's business: a result tells them by number.
        several = len(hosts) > 1
        named = [f"host {hosts.index(h)} {name}" if several else name for h, _, name in places]
        yield Ranks(rank, size, device, named)
    finally:
        dist.destroy_process_group()


def _device(machine: Machine, rank: int) -> torch.device:
    """The device of a rank: GPUs are counted on each host."""
    import torch

    from backfire.model.load import device_of

    device = device_of(machine.device)
    if rank == 0 or device.type == "cpu":
        return device
    local = int(os.environ.get("LOCAL_RANK", rank)) if launched() else rank
    return device_of(f"cuda:{local % torch.cuda.device_count()}")


def _place(device: torch.device) -> tuple[str, str, str]:
    """Host, identity of the GPU (empty for a CPU), and name of the device."""
    import torch

    if device.type == "cpu":
        return socket.gethostname(), "", "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return socket.gethostname(), str(torch.cuda.get_device_properties(index).uuid), f"cuda:{index}"


def _error(number: int, rank: int) -> str:
    return f"error {number} {rank}"


def _is_lost(error: BaseException) -> bool:
    """Whether this error tells that another rank has left."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


# ------------------------------------------------------------------------------- the other ranks


def serves() -> bool:
    """Whether torchrun or a program like it started this process as another rank than the first;
    then this call trains along until rank 0 ends."""
    outside = launched()
    if outside is None or outside[0] == 0:
        return False
    store, rank, size = _meet()

    def tasks() -> Iterator[Blob]:
        for number in count(1):
            try:
                store.wait([f"task {number}"], timedelta(days=365))
                blob = store.get(f"task {number}")
            except RuntimeError:  # rank 0 is gone, and the store with it
                return
            if not blob:
                return
            yield blob

    _serve(store, rank, size, tasks(), stays=True)
    return True


def _meet() -> tuple[Any, int, int]:
    """The store that the ranks of a launcher share, the own rank, and their number."""
    from torch.distributed.rendezvous import rendezvous

    # We shard models ourselves; transformers would load empty weights on most ranks.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    return store, rank, size


def _serve(store: Any, rank: int, size: int, blobs: Iterable[Blob], *, stays: bool) -> None:
    """Train along in every task; `stays`: also after one that failed here."""
    import torch

    from backfire.model.resident import Resident
    from backfire.registry import loaded, use

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when to end
    resident = Resident()

    def report(number: int, error: Exception) -> None:
        kind, sentence = exit_class(error)
        with suppress(RuntimeError):
            store.set(_error(number, rank), json.dumps([kind, sentence, _is_lost(error)]))

    for number, blob in enumerate(blobs, 1):
        plugins, rest = pickle.loads(blob)
        for plugin in plugins if not loaded() else ():
            use(plugin)
        task, threads = pickle.loads(rest)
        torch.set_num_threads(threads)
        try:
            with _joined(store, number, rank, size, task, lambda: None) as ranks:
                try:
                    task.train(ranks, resident, silent)
                except Exception as error:  # told before the others see that this rank has left
                    report(number, error)
                    raise
        except Exception as error:
            report(number, error)
            resident.release()
            if not stays:
                return


def _main(port: int, size: int, rank: int) -> None:
    """Serve as a rank that rank 0 started: its tasks come through the standard input, whose end is
    the end of this process too."""
    blobs = queue.SimpleQueue[Blob]()

    def read() -> None:
        while length := sys.stdin.buffer.read(8):
            blobs.put(sys.stdin.buffer.read(int.from_bytes(length, "little")))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(_HOST, port, is_master=False, timeout=_TIMEOUT)
    _serve(store, rank, size, iter(blobs.get, None), stays=False)
    # gloo closes its connections, for which the others wait, when nothing refers to a group any
    # more, and sharded weights do for long.
    os._exit(1)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
