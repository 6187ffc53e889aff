"""Resolves `auto` types on this machine, without torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from backfire.resources import has_gpu

Type = Literal["float32", "bfloat16", "float16"]


class Types(NamedTuple):
    """The resolved `auto` types of a device."""

    device: Literal["cpu", "cuda"]
    dtype: Type
    """Type of the frozen weights."""
    compute: Type
    """Type of the matrix products in training."""


GPU = Types("cuda", "bfloat16", "bfloat16")
"""Any GPU is assumed to support bfloat16, as all since 2020 do; a run checks it by torch
(`launch.resolve.types_of`)."""
_assumed: list[Types] = []


@lru_cache
def types_here() -> Types:
    """Types on device `auto`; keys of the embedded base depend on them."""
    return _assumed[-1] if _assumed else GPU if has_gpu() else types_of_cpu()


def assume(types: Types) -> None:
    """From now on, compute keys as a machine with this device does."""
    _assumed.append(types)
    types_here.cache_clear()


def types_of_cpu() -> Types:
    """Types on the CPU; exact."""
    return Types("cpu", "float32", "bfloat16" if _has_avx512_bf16() else "float32")


def _has_avx512_bf16() -> bool:
    """Whether the CPU has AVX512-BF16, by the same flags that `torch.cpu` reads. (Apple's CPUs do
    not have it.)"""
    return "avx512_bf16" in cpu_info("flags").split()


def cpu_info(field: str) -> str:
    """A field of Linux's description of the CPU; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    line = next((line for line in text.splitlines() if line.startswith(field)), "")
    return line.partition(":")[2].strip()


def gpu_bytes(device: str) -> int:
    """Memory of a GPU; imports torch."""
    import torch

    return torch.cuda.get_device_properties("cuda" if device == "auto" else device).total_memory
