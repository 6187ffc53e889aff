"""When a worker is to stop before its work is done: at a signal, at Ctrl-C, or after its time."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from backfire.signals import TO_STOP

_SLICE = 0.1  # seconds; a signal is noticed after this time


class Stop:
    """Whether a worker is to stop: after a signal, or when its time is over. It then saves a
    checkpoint and gives its job back."""

    def __init__(self, minutes: float | None = None) -> None:
        self.seconds = math.inf if minutes is None else 60 * minutes
        """What the worker has in total."""
        self.until = time.monotonic() + self.seconds
        self.signaled = False
        self.interrupted = False
        """By Ctrl-C."""

    def __bool__(self) -> bool:
        return self.signaled or time.monotonic() >= self.until

    @contextmanager
    def on_signals(self, at_ctrl_c: Callable[[], None] | None = None) -> Iterator[None]:
        """Stop at SIGTERM and SIGUSR1, which schedulers send before the end, and with `at_ctrl_c`
        at Ctrl-C: it is called then, and a second Ctrl-C ends at once. Only the main thread can:
        elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            self.signaled = True

        def interrupt(*_: Any) -> None:
            if self.interrupted:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise KeyboardInterrupt
            self.signaled = self.interrupted = True
            # This thread may be in the middle of a line.
            threading.Thread(target=at_ctrl_c, daemon=True).start()

        handlers: dict[int, Any] = dict.fromkeys(TO_STOP, stop)
        if at_ctrl_c and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # in a script's `&`
            handlers[signal.SIGINT] = interrupt
        former = {one: signal.signal(one, handler) for one, handler in handlers.items()}
        try:
            yield
        finally:
            for one, handler in former.items():
                signal.signal(one, handler)

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE))
