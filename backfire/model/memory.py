"""Frees memory that is no longer used."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from backfire.resources import free_bytes, ram_bytes

_HOLES, _FEW = 0.5, 2**26
"""Holes of the heap that are left: per byte that the largest pass holds, and in bytes."""
SCARCE = 0.25
"""Share of the main memory, 0 to 1, below which free memory is scarce."""


def free() -> None:
    """Free unused memory, that of reference cycles included, and return it to the system."""
    gc.collect()
    torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Return freed memory to the system. Without this glibc keeps what a pass used, such as 1 GB
    after scoring with an 8-bit model of 135 M weights."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class Heap:
    """Keeps the holes in a process's heap at most half as large as what the largest pass holds,
    where memory is scarce.

    Tensors of up to 32 MB are pieces of glibc's heap. Passes of many shapes leave holes in it that
    fit no tensor of the next pass, so the process grows with every shape: a LoRA run of a 135M
    model by 1 GB in ten steps. To return all free memory after each pass, or to give each tensor
    pages of its own (mallopt's M_MMAP_THRESHOLD), costs a quarter more time, as the next pass gets
    its memory page by page. Between the forward and the backward pass the holes are what the pass
    does not need; these are returned, if they are large. That costs up to a quarter more time too,
    so it is done only where less than a quarter of the memory is free: a LoRA run of a 135M model
    holds 3.4 GB, and 2.4 GB where memory is scarce. Elsewhere than with glibc nothing is done.
    """

    def __init__(self, device: torch.device) -> None:
        """To be made after the model is loaded."""
        self._on, self._other, self._pass = device.type == "cpu" and _in_use() > 0, 0, 0
        if self._on:
            trim()
            self._other = _resident() - _in_use()

    def used(self) -> int:
        """Bytes in use now."""
        return _in_use() if self._on else 0

    def tidy(self, before: int) -> None:
        """To be called between the forward and the backward pass. `before`: what was in use before
        the pass."""
        if self._on:
            self._pass = max(self._pass, _in_use() - before)
            holes = _resident() - self._other - before - self._pass
            if holes > max(_HOLES * self._pass, _FEW) and free_bytes() < SCARCE * ram_bytes():
                trim()


def _resident() -> int:
    """Bytes of main memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _in_use() -> int:
    """Bytes that were allocated from glibc and not freed; 0 with another C library, or one from
    before 2021."""
    if (look := _mallinfo()) is None:
        return 0
    found = look()
    return int(found.uordblks + found.hblkhd)


@cache
def _mallinfo() -> Any:
    """glibc's `mallinfo2`; None without it."""
    if sys.platform != "linux":
        return None
    try:
        look = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    look.restype = _MallInfo
    return look


class _MallInfo(ctypes.Structure):
    """What `mallinfo2` returns (malloc.h). `uordblks` is in use on the heap, `hblkhd` in pages of
    their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]
