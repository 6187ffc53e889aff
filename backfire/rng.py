"""Named random streams: every random choice has its own generator, named by its purpose.

A new choice in one place never shifts the numbers drawn elsewhere, and the global generators are
not used. (The exception is dropout, which torch draws from its global generator; the training loop
seeds it at every step from a named stream.)
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for this purpose, as in `derive(0, "order", epoch)`."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *purpose: object) -> Random:
    """A separate generator for this purpose."""
    return Random(derive(seed, *purpose))


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed torch's global generators, as `torch.manual_seed`, of which only the CPU's counts on a
    CPU. That function would also note the seed, with a traceback, for a GPU that is used later."""
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
