"""Products in float32 by the faster of the two libraries that torch holds for them.

MKL, which torch uses, keeps to vectors of 256 bits on processors that are not Intel's. oneDNN does
not: where the processor has vectors of 512 bits it is about twice as fast. Both compute in float32.
Which one is used depends on the processor alone, never on a measurement, so that a run repeats bit
by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from backfire.model.types import cpu_info

_FEWEST_ROWS = 8
"""With fewer rows oneDNN is slower: 0.5 of MKL's speed with one, 1.05 to 1.5 with eight, 2 with 64
(384 to 1,536 inputs and outputs)."""


@contextmanager
def fast_products(model: nn.Module, compute: str = "float32") -> Iterator[None]:
    """Let the linear layers in float32 use the faster library within the context, in which the
    products are in the type `compute`."""
    linears = [m for m in model.modules() if type(m) is nn.Linear and compute == "float32"]
    layers = [m for m in linears if _is_slow(m.weight) and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [..., input] to [..., output]."""
    rows = x.numel() // max(1, x.shape[-1])
    if x.dtype == torch.float32 and rows >= _FEWEST_ROWS and _is_slow(weight):
        out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return nn.functional.linear(x, weight, bias)


def _is_slow(weight: Tensor) -> bool:
    """Whether torch's own products with this weight use half of the processor."""
    is_plain = type(weight) in (Tensor, nn.Parameter)  # neither sharded nor without data
    on_cpu = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_plain and on_cpu and mkl_is_slow()


@lru_cache
def mkl_is_slow() -> bool:
    """Whether this processor has wide vectors that MKL does not use."""
    backends: Any = torch.backends
    return (
        backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu_info("vendor_id") != "GenuineIntel"
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        x_grad = linear(grad, weight.t()) if wants[0] else None
        flat = grad.flatten(0, -2)
        w_grad = linear(flat.t(), x.flatten(0, -2).t()) if wants[1] else None
        return x_grad, w_grad, flat.sum(0) if wants[2] else None
