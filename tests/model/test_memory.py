"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from backfire.model import memory
from backfire.model.memory import Heap, trim


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


@pytest.mark.skipif(memory._mallinfo() is None, reason="glibc tells what is in use")
def test_a_heap_with_many_holes_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = list[None]()
    heap = Heap(torch.device("cpu"))
    free = [0]
    monkeypatch.setattr(memory, "free_bytes", lambda: free[0])
    monkeypatch.setattr(memory, "trim", lambda: trims.append(trim()))  # type: ignore[func-returns-value]
    before = heap.used()
    tensors = [torch.ones(2**14) for _ in range(6000)]  # 64 KB each: a piece of the heap
    heap.tidy(before)
    tensors = tensors[::4]
    heap.tidy(before)
    assert not trims, "another pass as large needs the holes"
    large = [torch.ones(2**17) for _ in range(500)]  # fit into none of them
    free[0] = memory.ram_bytes()
    heap.tidy(before)
    assert not trims, "memory is not scarce"
    free[0] = 0
    heap.tidy(before)
    assert trims == [None]
    assert memory._resident() - heap._other - before < 400 * 2**20, "344 of 625 MB are in use"
    heap.tidy(before)
    assert len(trims) == 1 and len(tensors) + len(large) == 2000


def test_a_heap_that_cannot_be_measured_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_mallinfo", lambda: None)
    monkeypatch.setattr(memory, "trim", lambda: pytest.fail("trimmed"))
    heap = Heap(torch.device("cpu"))
    heap.tidy(heap.used())
