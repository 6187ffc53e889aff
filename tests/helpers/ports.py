"""Ports for servers of tests, where two processes must know the number before one has it."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 12_000, 30_000
"""Below those that systems give to whoever asks for any port, so that nobody gets one by chance."""


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    rng = random.SystemRandom()  # two processes of a suite may have the same seed
    while True:
        port = rng.randint(_FIRST, _LAST)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
