"""How long work reports progress: a callback, and a text with the loss and the rows a second.

The text is all that crosses from a worker to whoever watches it, so `Pace` writes its numbers and
`facts` reads them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, SupportsFloat

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in total, and a short text on the current step."""

_READ_SECONDS = 0.2  # a loss on a GPU is read no more often: reading waits for the step
_FACTS = re.compile(
    r"(?P<activity>.*?)(, loss (?P<loss>-?(\d+\.\d+|nan|inf)))?"
    r"(, (?P<rate>\d+(\.\d+)?) rows/s)?(?P<where> on \S+)?"
)


def silent(done: int, total: int, text: str) -> None:
    """Report nothing."""


_looks: ContextVar[Callable[[], object]] = ContextVar("_looks", default=lambda: None)


@contextmanager
def while_waiting(look: Callable[[], object]) -> Iterator[None]:
    """Let what waits for others call this function, which raises an error to end the wait."""
    token = _looks.set(look)
    try:
        yield
    finally:
        _looks.reset(token)


def waits() -> None:
    """To be called a few times a second by what waits for a lock or a server.

    Raises:
        Stopped: the worker is to stop; other errors of `while_waiting` too.
    """
    _looks.get()()


def within(part: str, progress: Progress) -> Progress:
    """A callback whose texts begin with the part of the work that they are about."""
    return lambda done, total, text: progress(done, total, f"{part}: {text}")


class Facts(NamedTuple):
    """What a text says."""

    activity: str
    loss: float | None
    rows_per_second: float | None


class Pace:
    """Words texts such as `training, loss 0.512, 85 rows/s`; `rows` are those done before."""

    def __init__(self, rows: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows, self.clock, self.begun = rows, clock, clock()
        self._loss, self._read = "", -1.0

    def text(self, activity: str, rows: int, loss: SupportsFloat | None = None) -> str:
        """The text after `rows` rows in total; its loss is at most a fifth of a second old."""
        now = self.clock()
        if loss is not None and (self._read < 0 or now - self._read >= _READ_SECONDS):
            self._loss, self._read = f", loss {float(loss):.3f}", now
        rate, seconds = "", now - self.begun
        if rows > self.rows and seconds > 0:
            rate = f", {_short((rows - self.rows) / seconds)} rows/s"
        return f"{activity}{self._loss}{rate}"


def facts(text: str) -> Facts:
    """The activity of a text, with ` on HOST` at its end, and its numbers if it has any."""
    found = _FACTS.fullmatch(text)
    if found is None:  # more than one line
        return Facts(text, None, None)
    loss, rate = float(found["loss"] or "nan"), found["rate"]
    activity = found["activity"] + (found["where"] or "")
    # Training ends some steps after the loss is not finite, and JSON has no such number.
    return Facts(activity, loss if math.isfinite(loss) else None, float(rate) if rate else None)


def _short(value: float) -> str:
    """Two significant digits, or the whole number if it has more."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
