"""Keeps the signals by which schedulers end a job from processes that must outlast its workers.

They often go to every process of a job, as Ctrl-C goes to every process of a terminal. A worker
saves a checkpoint, which needs the processes that help it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

TO_STOP = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that tell a worker to stop."""


@contextmanager
def held_back(*signals: int) -> Iterator[None]:
    """Let these signals wait until the end. A process that is started meanwhile does not get them,
    unless it lets them in."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def let_in(*signals: int) -> Iterator[None]:
    """Get these signals, also those that came while they were held back."""
    former = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
