"""Type of the callback by which long work reports progress."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in total, and a short text on the current step."""


def silent(done: int, total: int, text: str) -> None:
    """Report nothing."""
