"""What a command and all processes that it starts need: time, processor time and memory."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY = 1.0
"""Seconds between two looks at the memory."""
_ADOPT = 36
"""`PR_SET_CHILD_SUBREAPER` of Linux."""


@dataclass(frozen=True)
class Usage:
    """What a tree of processes needed."""

    seconds: float
    cpu: float
    peak_mb: float
    """Memory of all processes at once; what they share counts once."""


def watched(command: Sequence[str], env: Mapping[str, str], log: Path) -> Usage:
    """Run a command to its end, with its output in `log`.

    Raises:
        RuntimeError: it failed.
    """
    _adopt()
    before, earlier = _cpu(), set(psutil.Process().children(recursive=True))
    begin, peak = time.perf_counter(), 0.0
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(env), stdout=out, stderr=out)
        while True:
            try:
                process.wait(_EVERY)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, sum(map(_memory, _children(earlier))))
    seconds = time.perf_counter() - begin
    psutil.wait_procs(_children(earlier), timeout=30)
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")
    return Usage(round(seconds, 2), round(_cpu() - before, 2), round(peak / 1e6))


def _adopt() -> None:
    """Become the parent of processes whose own parent ends first, so that their time counts too.
    Only Linux can do so."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _children(earlier: set[psutil.Process]) -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process not in earlier]


def _memory(process: psutil.Process) -> float:
    """Bytes of a process, with its share of what others have too; 0 if it has ended."""
    try:
        memory = process.memory_full_info()
        return float(getattr(memory, "pss", memory.uss))
    except psutil.Error:
        return 0.0
