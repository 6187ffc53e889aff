"""Cores, memory and GPUs that this process may use; imports no torch.

A job or a container rarely has the whole machine: its affinity, its control groups (versions 1 and
2, each nested) and Slurm set limits.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


def cores() -> int:
    """Number of cores that this process may use; at least 1."""
    counts = [os.cpu_count() or 1, *Groups().cores(), *_slurm_cores()]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        counts.append(len(os.sched_getaffinity(0)))
    return max(1, min(counts))


def ram_bytes() -> int:
    """Main memory that this process may use: the machine's, or less in a container or a job."""
    limits = (limit for limit, _ in Groups().memory())
    return int(min([psutil.virtual_memory().total, *limits, *_slurm_memory()]))


def free_bytes() -> int:
    """Main memory that is free for this process; what the system can take back from files counts
    as free."""
    free = (max(0, limit - used) for limit, used in Groups().memory())
    return int(min([psutil.virtual_memory().available, *free, *_slurm_memory()]))


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible to this process, without CUDA calls."""
    return bool(gpus())


def gpus(devices: Path = Path("/dev")) -> list[str]:
    """Visible NVIDIA GPUs, as `CUDA_VISIBLE_DEVICES` names them: numbers or UUIDs."""
    count = len(list(devices.glob("nvidia[0-9]*"))) or int((devices / "dxg").exists())  # dxg: WSL
    if "CUDA_VISIBLE_DEVICES" not in os.environ or not count:
        return [str(number) for number in range(count)]
    there = itertools.takewhile(lambda one: not one.isdecimal() or int(one) < count, named_gpus())
    return list(there)


def named_gpus() -> list[str]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, whether they are there or not; none if it is not
    set. CUDA ignores all after a word such as `-1` or `none`, by which people hide GPUs."""
    listed = map(str.strip, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    return list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, listed))


# ----------------------------------------------------------------------------- control groups


@dataclass(frozen=True)
class Groups:
    """The limits of this process's control groups, and of the groups around them."""

    root: Path = Path("/sys/fs/cgroup")
    listing: Path = Path("/proc/self/cgroup")

    def cores(self) -> Iterator[int]:
        """Each group's quota of processor time in cores, rounded up."""
        for group in self._of("cpu"):
            quota = _numbers(group / "cpu.max") or [
                *_numbers(group / "cpu.cfs_quota_us"),
                *_numbers(group / "cpu.cfs_period_us"),
            ]
            if len(quota) == 2 and min(quota) > 0:
                yield math.ceil(quota[0] / quota[1])

    def memory(self) -> Iterator[tuple[int, int]]:
        """Each group's limit in bytes, and how much of it is used, without the cache of files."""
        for group in self._of("memory"):
            names = ("memory.max", "memory.high", "memory.limit_in_bytes")
            if limits := [number for name in names for number in _numbers(group / name)]:
                used = _numbers(group / "memory.current") or _numbers(
                    group / "memory.usage_in_bytes"
                )
                yield min(limits), max(0, sum(used) - _cached(group / "memory.stat"))

    def _of(self, kind: str) -> Iterator[Path]:
        """The folders with limits of this kind, from the innermost to the root. In a container
        this process's group is the root, whatever the listing says."""
        for line in _text(self.listing).splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and kind not in kinds.split(","):
                continue
            places = [self.root / kinds, self.root / kind] if kinds else [self.root]
            places += [] if kinds else [self.root / "unified"]  # beside version 1
            place = next((one for one in places if (one / path.lstrip("/")).is_dir()), places[0])
            group = place / path.lstrip("/")
            yield from (one for one in (group, *group.parents) if one.is_relative_to(place))


def _cached(file: Path) -> int:
    """Bytes of files in a group's memory, which the system frees on demand. (Version 1 gives the
    sum with the groups inside as `total_...`.)"""
    found = dict(re.findall(r"^(\w+) (\d+)$", _text(file), re.MULTILINE))
    kinds = ("active_file", "inactive_file")
    return sum(int(found.get(f"total_{kind}") or found.get(kind) or 0) for kind in kinds)


def _numbers(file: Path) -> list[int]:
    """The numbers in a file; none if it is absent or says `max`."""
    try:
        return [int(word) for word in _text(file).split()]
    except ValueError:
        return []


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


# -------------------------------------------------------------------------------------- Slurm


def _slurm_cores() -> list[int]:
    """Cores of this task: as requested, or its share of the job's cores on this node."""
    if each := _variable("SLURM_CPUS_PER_TASK"):
        return [each]
    on_node = _variable("SLURM_CPUS_ON_NODE")
    return [max(1, on_node // _tasks())] if on_node else []


def _slurm_memory() -> list[int]:
    """Bytes of this task: its share of the job's memory on this node, which Slurm gives in MiB."""
    if on_node := _variable("SLURM_MEM_PER_NODE"):
        return [on_node * 2**20 // _tasks()]
    each, count = _variable("SLURM_MEM_PER_CPU"), _slurm_cores()
    return [each * 2**20 * count[0]] if each and count else []


def _tasks() -> int:
    """Tasks of this job step on a node; 1 outside a step. Slurm writes them as `2(x3),1`."""
    return max(1, _variable("SLURM_STEP_TASKS_PER_NODE", lambda text: re.split(r"\D", text)[0]))


def _variable(name: str, part: Callable[[str], str] = str.strip) -> int:
    """A number from the environment; 0 if there is none."""
    text = part(os.environ.get(name, ""))
    return int(text) if text.isdecimal() else 0
