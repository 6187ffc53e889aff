"""Processes that a row starts, watches and kills. They are forked from a server that has imported
torch already, so one starts in a fraction of a second."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["backfire.launch.preload", "tests.torture.preload"])


class Child:
    """A process that calls `work(say, *arguments)`; `say` sends a value to the parent."""

    def __init__(self, work: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self.pipe, far = CONTEXT.Pipe()
        given = (far, work, arguments, environment)
        self.process = CONTEXT.Process(target=_enter, args=given)
        self.process.start()
        far.close()

    def said(self, seconds: float = 300) -> Any:
        """The next value; None once the process is dead and all it said is read.

        Raises:
            TimeoutError: it neither says anything nor ends.
            RuntimeError: `work` raised an error, which the message has.
        """
        if not self.pipe.poll(seconds):
            raise TimeoutError(f"nothing in {seconds} s from {self.process}")
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def result(self, seconds: float = 300) -> Any:
        """The last value, which is what `work` returned; None if it was killed."""
        last = value = self.said(seconds)
        while value is not None:
            last, value = value, self.said(seconds)
        return last

    def kill(self) -> None:
        """SIGKILL for the process and for all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # if it was not yet in a session of its own
        self.process.join()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def wait(self, seconds: float) -> bool:
        """Whether the process is still there after this time."""
        self.process.join(seconds)
        return self.process.is_alive()


def _enter(
    pipe: Connection, work: Callable[..., Any], arguments: Any, environment: dict[str, str]
) -> None:
    os.setsid()  # so that `kill` reaches what it starts
    os.environ.update(environment)
    try:
        value = work(lambda value: pipe.send(("said", value)), *arguments)
        pipe.send(("said", value))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
