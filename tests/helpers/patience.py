"""Waits for what another thread or process does. Long patience costs nothing when a test passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

LONG = 100.0
"""Seconds: less than a test may take, more than anything that is waited for takes on a busy
machine."""


def until(condition: Callable[[], Value], seconds: float = LONG, every: float = 0.01) -> Value:
    """The value of a condition, once it is true.

    Raises:
        TimeoutError: it is not true in time.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not in {seconds} s")
        time.sleep(every)
    return value
