"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from backfire.model.memory import trim


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_between_live_tensors_is_returned() -> None:
    def resident_mb() -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    # Below the size from which glibc maps a block of its own; every second block stays.
    blocks = [torch.ones(16_000) for _ in range(2_000)]
    kept = blocks[::2]
    del blocks
    before = resident_mb()
    trim()
    assert before - resident_mb() > 30, "of 64 MB"
    assert len(kept) == 1000
