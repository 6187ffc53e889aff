"""LoRA adapters with fewer operations, for evaluation.

PEFT multiplies by A and by B, scales, adds and converts between types, each over the whole output.
Here a layer multiplies by A, and adds the product with the scaled B to the base's output, in place
if both have one type. An adapter keeps its own type, so only rounding changes. The weights of the
base are never touched, so quantized bases are fine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def fused_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Fuse the active LoRA adapters of all linear layers within the context, which must be without
    gradients. Layers with DoRA, a bias, active dropout or merged weights are unchanged."""
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    with replaced_forwards({layer: partial(_forward, layer, _pair(layer)) for layer in layers}):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[torch.nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Give modules another `forward` within the context."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            cast(Any, module).forward = forward
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                vars(module).pop("forward", None)
            else:
                cast(Any, module).forward = earlier


_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
"""Names of PEFT's classes for LoRA on a linear layer."""


def _is_plain(layer: Any) -> bool:
    if type(layer).__name__ not in _KINDS or not hasattr(layer, "lora_A"):
        return False
    if layer.disable_adapters or layer.merged:
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    parts = [layer.lora_A[name] for name in names] + [layer.lora_B[name] for name in names]
    linear = all(type(part) is torch.nn.Linear and part.bias is None for part in parts)
    dropout = (layer.lora_dropout[name] for name in names)
    drops = any(part.training for part in dropout if isinstance(part, torch.nn.Dropout))
    return bool(names) and linear and not drops and not set(names) & set(layer.lora_variant)


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    """A [rank, input] and the scaled B [output, rank] of all active adapters together."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    a = torch.cat([layer.lora_A[name].weight.detach() for name in names])
    b = [layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names]
    return a, torch.cat(b, 1)


def _forward(
    layer: Any, pair: tuple[Tensor, Tensor], x: Tensor, *rest: Any, **named: Any
) -> Tensor:
    """base(x) + x A^T B^T: [..., input] to [..., output]."""
    out: Tensor = layer.base_layer(x, *rest, **named)
    if layer.disable_adapters:
        return out
    a, b = pair
    low_rank = x.to(a.dtype).reshape(-1, x.shape[-1]) @ a.T
    if out.dtype != a.dtype:  # as in PEFT: the sum is rounded once
        return (out + (low_rank @ b.T).view(out.shape)).to(out.dtype)
    out.view(-1, out.shape[-1]).addmm_(low_rank, b.T)
    return out
