"""The ranks of a training run other than the first: they train along, and write nothing.

Each is a process that gets its tasks through the standard input, and ends with it. One in which a
task fails ends too, so that its connections close and the others learn of it at once, wherever they
wait. Where torchrun or a program like it has started the ranks, its process stays: it starts such a
process, hands it the tasks of the first rank, and replaces it after a task that failed.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

from backfire.errors import exit_class
from backfire.progress import silent
from backfire.signals import TO_STOP, held_back
from backfire.train.devices import launched
from backfire.train.group import TIMEOUT, error_key, is_lost, joined, meet

HOST = "127.0.0.1"
_POLL = 0.1
"""Seconds between two looks for a task of the first rank."""


def start(rank: int, size: int, port: int | None = None) -> subprocess.Popen[bytes]:
    """Start a rank in a process of its own. It finds the others by the store at this port of the
    host, or as the launcher's variables say."""
    command = [sys.executable, "-m", __name__, str(rank), str(size), str(port or 0)]
    with held_back(*TO_STOP):  # they are for the first rank, as Ctrl-C is
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,
        )


def send(process: subprocess.Popen[bytes], blob: bytes) -> None:
    """Hand a rank its next task."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, which whoever waits for it sees
        process.stdin.write(len(blob).to_bytes(8, "little") + blob)
        process.stdin.flush()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a rank."""
    process.kill()
    process.wait()
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()


def why_ended(rank: int, size: int, code: int) -> tuple[str, str]:
    """Exit class and sentence for a rank whose process has ended."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return "killed", f"Rank {rank} of {size} {how} while training."


# ----------------------------------------------------------------- the process of a launcher


def serves() -> bool:
    """Whether torchrun or a program like it started this process as another rank than the first;
    then this call trains along until the first one ends."""
    outside = launched()
    if outside is None or outside[0] == 0:
        return False
    for one in (signal.SIGINT, *TO_STOP):  # the first rank decides when to end
        signal.signal(one, signal.SIG_IGN)
    store, rank, size = meet()
    process: subprocess.Popen[bytes] | None = None
    for number in count(1):
        blob = _next(store, number, rank, size, process)
        if process and (not blob or _is_stuck(store, number - 1, process)):
            end(process)
            process = None
        if not blob:
            return True
        process = process or start(rank, size)
        send(process, blob)
    return True


def _is_stuck(store: Any, number: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended with this task, or waits in it for others that have left."""
    return process.poll() is not None or bool(store.check([failed(number)]))


def task_key(number: int) -> str:
    return f"task {number}"


def failed(number: int) -> str:
    """Key for a task that the first rank has given up."""
    return f"failed {number}"


def _next(
    store: Any, number: int, rank: int, size: int, process: subprocess.Popen[bytes] | None
) -> bytes:
    """The next task; empty if there is none any more. Meanwhile, tell if the process has ended."""
    try:
        while not store.check([task_key(number)]):
            code = process.poll() if process else None
            if code is not None and not store.check([key := error_key(number - 1, rank)]):
                store.set(key, json.dumps([*why_ended(rank, size, code), False]))
            time.sleep(_POLL)
        return bytes(store.get(task_key(number)))
    except RuntimeError:  # the first rank is gone, and the store with it
        return b""


# --------------------------------------------------------------------- the process that trains


def _serve(store: Any, rank: int, size: int, blobs: Iterator[bytes]) -> None:
    """Train along in every task, until one fails."""
    import torch

    from backfire.model.resident import Resident
    from backfire.registry import loaded, use

    resident = Resident()
    for blob in blobs:
        number, plugins, rest = pickle.loads(blob)
        try:
            for plugin in plugins if not loaded() else ():
                use(plugin)
            task, threads = pickle.loads(rest)
            torch.set_num_threads(threads)
            with joined(store, number, rank, size, task.machine, lambda: None) as ranks:
                try:
                    task.train(ranks, resident, silent)
                except Exception as error:
                    # Told before the others see that this rank has left. The process ends here,
                    # as sharded weights would keep its connections open.
                    _tell(store, number, rank, error)
                    os._exit(1)
        except Exception as error:
            _tell(store, number, rank, error)
            os._exit(1)


def _tell(store: Any, number: int, rank: int, error: Exception) -> None:
    with suppress(RuntimeError):
        told = json.dumps([*exit_class(error), is_lost(error)])
        store.set(error_key(number, rank), told)


def _main(rank: int, size: int, port: int) -> None:
    blobs = queue.SimpleQueue[bytes]()

    def read() -> None:
        while length := sys.stdin.buffer.read(8):
            blobs.put(sys.stdin.buffer.read(int.from_bytes(length, "little")))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    if port:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)
    else:
        store = meet()[0]
    _serve(store, rank, size, iter(blobs.get, None))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
