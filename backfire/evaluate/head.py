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

_AT_ONCE = 2**14  # vocabulary entries whose weights are cast at once


@contextmanager
def exact_head(model: PreTrainedModel) -> Iterator[None]:
    """Make the head multiply in float32 within the context; quantized heads are unchanged."""
    head = cast(Any, model).get_output_embeddings()
    narrow = [m for m in head.modules() if _is_half_precision(m)] if head is not None else []
    before = [vars(module).get("forward") for module in narrow]
    try:
        for module in narrow:
            cast(Any, module).forward = partial(_forward_float32, module)
        yield
    finally:
        for module, forward in zip(narrow, before, strict=True):
            if forward is None:
                del cast(Any, module).forward
            else:
                cast(Any, module).forward = forward


def _is_half_precision(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype in (torch.bfloat16, torch.float16)


def _forward_float32(layer: nn.Linear, states: Tensor) -> Tensor:
    """states @ weight + bias: [..., input] to [..., output].

    Raises:
        CellError: the model computes in float16 and exceeded it (`nan`).
    """
    if layer.weight.dtype == torch.float16 and not bool(torch.isfinite(states).all()):
        raise CellError(
            "nan",
            "Hidden states exceed float16's largest number, 65,504; use model.dtype bfloat16 or "
            "float32.",
        )
    states, bias, size = states.float(), layer.bias, layer.out_features
    parts = [
        nn.functional.linear(states, layer.weight[start : start + _AT_ONCE].float())
        for start in range(0, size, _AT_ONCE)
    ]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return whole if bias is None else whole + bias.float()
