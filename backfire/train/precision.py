"""Mixed precision: bfloat16 matrix products where they are fast, float32 attention on CPUs."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Compute = Literal["float32", "bfloat16"]
_EXACT = "sdpa_float32"


def compute_type(setting: str, device: torch.device) -> Compute:
    """Resolve `Train.compute` for this device."""
    if setting != "auto":
        return cast(Compute, setting)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def accelerator_for(device: torch.device, compute: Compute) -> Accelerator:
    """An accelerator for this device, with matrix products in this type."""
    mixed = "bf16" if compute == "bfloat16" else "no"
    AcceleratorState._reset_state()  # its settings are global, and the next run may need others
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)


def exact_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Keep attention in float32 on a CPU, where its bfloat16 backward is six times slower."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
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
