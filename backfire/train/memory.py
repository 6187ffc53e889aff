"""Whether an error means that memory ran out: each library says it in its own way."""

from __future__ import annotations

import torch

_SAID = (
    "out of memory",  # CUDA's own error, NCCL, bitsandbytes
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # torch on a CPU, on some systems
    "alloc_failed",  # cuBLAS, cuDNN, cuSPARSE: CUBLAS_STATUS_ALLOC_FAILED
    "cudaerrormemoryallocation",
    "failed to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed where this error was raised."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _SAID)
