"""What `auto` types come to on this machine, found without torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

Type = Literal["float32", "bfloat16"]


class Types(NamedTuple):
    """What `auto` comes to on a device."""

    device: Literal["cpu", "cuda"]
    dtype: Type
    """Of the weights that do not move."""
    compute: Type
    """Of the matrix products in training."""


@lru_cache
def types_here() -> Types:
    """On device `auto`. Any GPU is taken for one that multiplies in bfloat16, as all since 2020 do:
    a run, which can ask torch, settles it for good."""
    return Types("cuda", "bfloat16", "bfloat16") if has_gpu() else types_of_cpu()


def types_of_cpu() -> Types:
    """On the CPU; exact."""
    return Types("cpu", "float32", "bfloat16" if _has_avx512_bf16() else "float32")


def has_gpu() -> bool:
    """Whether there is a GPU of NVIDIA's, without asking CUDA (`dxg`: within Windows)."""
    return Path("/dev/dxg").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def _has_avx512_bf16() -> bool:
    """As `torch.cpu` says it of this machine, from the same flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux, and of Apple's none has it
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split()
