"""Mixed precision: 16-bit matrix products where they are fast, float32 attention on CPUs."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from backfire.model.batching import chosen_of
from backfire.model.load import gpu_type
from backfire.model.types import Type

_EXACT = "sdpa_float32"


def compute_type(setting: str, device: torch.device) -> Type:
    """Resolve `Train.compute` for this device."""
    if setting != "auto":
        return cast(Type, setting)
    if device.type == "cuda":
        return gpu_type(device)
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


class Precision(NamedTuple):
    """The device of a training run, and the type of its matrix products."""

    device: torch.device
    compute: Type

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.compute))


def exact_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Keep attention in float32 on a CPU, where its bfloat16 backward is six times slower; not of a
    model that chooses keys (see `chosen_of`)."""
    own = model.config._attn_implementation == "sdpa" and not chosen_of(model.config)
    if model.device.type == "cpu" and own:
        AttentionInterface.register(_EXACT, _sdpa_float32)
        AttentionMaskInterface.register(_EXACT, sdpa_mask)
        model.set_attn_implementation(_EXACT)
    return model


def _sdpa_float32(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, None]:
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), mask, **rest
        )
    return cast(Tensor, out).to(query.dtype), None


def disable_adapter_casts(model: PreTrainedModel) -> None:
    """Stop PEFT from casting adapter inputs to float32, which autocast would undo.

    This saves memory with bitwise equal results. DoRA layers keep the cast, since part of DoRA runs
    outside autocast.
    """
    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", ())
        if hasattr(module, "cast_input_dtype_enabled") and not magnitudes:
            module.cast_input_dtype_enabled = False
