"""How long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in total, and a few words on the current one."""


def silent(done: int, total: int, text: str) -> None:
    """Report nothing."""
