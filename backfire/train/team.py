"""The processes of a training run on several devices: starts them, and hands each its task.

The worker is rank 0. It starts the other ranks as processes of its own, or torchrun or `accelerate
launch` has started them (see `train.members`). For each task all ranks join a new process group, so
that nothing of a failed one is left.
"""

from __future__ import annotations

import atexit
import json
import math
import pickle
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backfire.errors import CellError
from backfire.progress import Progress
from backfire.train import members
from backfire.train.devices import OUT_OF_MEMORY, check, launched
from backfire.train.group import TIMEOUT, error_key, is_lost, joined, meet

if TYPE_CHECKING:
    from backfire.model.resident import Resident
    from backfire.train.finetune import Task


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
            return _team_of(task.machine.devices).train(task, resident, progress)
        except CellError as error:
            if str(error) != OUT_OF_MEMORY or rows == 1:
                raise
        rows = math.ceil(rows / 2)
        progress(0, 1, f"out of memory; again with {rows} rows per pass")
        task = replace(task, machine=task.machine.model_copy(update={"micro_batch": rows}))


class _Team:
    """Rank 0's view of the other ranks."""

    def __init__(self, store: Any, size: int, processes: list[subprocess.Popen[bytes]]) -> None:
        """`processes`: ranks 1 and up, if this process started them."""
        self.store, self.size, self.processes = store, size, processes
        self.number = 0

    def train(self, task: Task, resident: Resident, progress: Progress) -> dict[str, Any]:
        import torch

        from backfire.registry import loaded

        before = torch.get_num_threads()
        threads = max(1, before // self.size) if self.processes else before
        number, size, machine = self.number + 1, self.size, task.machine
        # Plug-ins come first: the task may hold objects of their classes.
        blob = pickle.dumps((number, loaded(), pickle.dumps((task, threads))))
        self.number = number
        self._send(blob)
        torch.set_num_threads(threads)
        try:
            with joined(self.store, number, 0, size, machine, self._check) as ranks:
                return task.train(ranks, resident, progress)
        except BaseException as error:
            cause = self._cause(error) if isinstance(error, Exception) else None
            self._give_up()
            if cause:
                raise cause from error
            raise
        finally:
            torch.set_num_threads(before)

    def _send(self, blob: bytes) -> None:
        if not self.processes:
            self.store.set(members.task_key(self.number), blob)
        for process in self.processes:
            members.send(process, blob)

    def _give_up(self) -> None:
        """Let nothing of the task go on: a rank may wait for another one in it."""
        if self.processes:
            _disband()
        else:
            with suppress(RuntimeError):
                self.store.set(members.failed(self.number), b"")

    def _check(self) -> None:
        """Raise the error of a rank that has left."""
        if error := self._found():
            raise error

    def _found(self) -> CellError | None:
        for rank in range(1, self.size):
            if self.store.check([key := error_key(self.number, rank)]):
                kind, sentence, is_effect = json.loads(self.store.get(key))
                if not is_effect:
                    return CellError(kind, sentence)
            elif self.processes and (code := self.processes[rank - 1].poll()) is not None:
                return CellError(*members.why_ended(rank, self.size, code))
        return None

    @property
    def is_whole(self) -> bool:
        """Whether no rank that this process started has ended."""
        return all(process.poll() is None for process in self.processes)

    def _cause(self, error: Exception) -> CellError | None:
        """Why another rank has left, if this error is only the effect of that."""
        if not is_lost(error):
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
                self.store.set(members.task_key(self.number + 1), b"")
        for process in self.processes:
            members.end(process)


_team: _Team | None = None
"""The ranks of this worker, kept from job to job."""


def _team_of(size: int) -> _Team:
    global _team
    if _team and not (_team.size == size and _team.is_whole):
        _disband()
    if _team is None:
        _team = _Team(meet()[0], size, []) if launched() else _started(size)
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

    store = TCPStore(members.HOST, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    return _Team(store, size, [members.start(rank, size, store.port) for rank in range(1, size)])
