"""Logits in float32, for weights of any type.

Near 18, bfloat16 numbers are 0.125 apart, so two labels or codes would often tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backfire.errors import CellError
from backfire.model.fused import fused_adapters, replaced_forwards
from backfire.model.products import fast_products

_AT_ONCE = 2**14  # vocabulary entries whose weights are cast at once
_WEIGHTS_ON_CPU = 2**20  # the same in weights: they stay in the processor's cache


@contextmanager
def exact_head(model: PreTrainedModel) -> Iterator[None]:
    """Make the head multiply in float32 within the context; quantized heads are unchanged."""
    head = cast(Any, model).get_output_embeddings()
    narrow = [m for m in head.modules() if _is_half_precision(m)] if head is not None else []
    with replaced_forwards({module: partial(_forward_float32, module) for module in narrow}):
        yield


@contextmanager
def for_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """The model as it is evaluated: logits in float32, LoRA adapters fused. Without gradients."""
    with exact_head(model), fused_adapters(model), fast_products(model):
        yield


def _is_half_precision(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype in (torch.bfloat16, torch.float16)


def _forward_float32(layer: nn.Linear, states: Tensor) -> Tensor:
    """states @ weight + bias: [..., input] to [..., output], on the layer's device, where a base on
    several GPUs has them moved by the `forward` that this replaces; without gradients.

    Raises:
        CellError: the model computes in float16 and exceeded it (`nan`).
    """
    states = states.to(layer.weight.device)
    if layer.weight.dtype == torch.float16 and not bool(torch.isfinite(states).all()):
        raise CellError(
            "nan",
            "Hidden states exceed float16's largest number, 65,504; use model.dtype bfloat16 or "
            "float32.",
        )
    flat, size = states.float().flatten(0, -2), layer.out_features
    logits = flat.new_empty(len(flat), size)
    step = _AT_ONCE if states.is_cuda else max(1, _WEIGHTS_ON_CPU // layer.in_features)
    for start in range(0, size, step):
        weight = layer.weight[start : start + step].float()
        torch.mm(flat, weight.T, out=logits[:, start : start + step])
    if layer.bias is not None:
        logits += layer.bias.float()
    return logits.view(*states.shape[:-1], size)
