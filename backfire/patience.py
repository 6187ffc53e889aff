"""Repeats small file operations while a shared file system does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from backfire.errors import is_away

LONGEST = 180.0
"""Seconds until an operation is given up. A server that restarts is back by then, and the worker's
claims are not stale yet."""
_FIRST, _MOST = 0.1, 5.0  # seconds between two attempts; each is twice the last
Result = TypeVar("Result")


def patiently(operation: Callable[[], Result]) -> Result:
    """The operation's result; it is repeated for three minutes on errors such as ESTALE or EIO.

    Raises:
        OSError: its last error, or at once any other.
    """
    wait, begun = _FIRST, time.monotonic()
    while True:
        try:
            return operation()
        except OSError as error:
            if not is_away(error) or time.monotonic() + wait > begun + LONGEST:
                raise
        time.sleep(wait)
        wait = min(2 * wait, _MOST)
