"""Quantizes frozen bases by bitsandbytes, and counts the weights of loaded models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from backfire.data.weights import first_line
from backfire.errors import CellError, UserError


def quantizer(settings: Mapping[str, Any]) -> BitsAndBytesConfig:
    """transformers' quantization configuration for these settings.

    Raises:
        UserError: bitsandbytes is missing or does not run here.
    """
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        raise UserError(
            "A quantized base needs bitsandbytes, which does not load here "
            f"({first_line(error)}): pip install bitsandbytes, or use method lora."
        ) from None
    dtype = settings.get("bnb_4bit_compute_dtype")
    typed = {"bnb_4bit_compute_dtype": getattr(torch, dtype)} if dtype else {}
    return BitsAndBytesConfig(**{**settings, **typed})


def num_quantized(model: PreTrainedModel) -> int:
    """Number of layers whose weights are in 8 or 4 bits."""
    kinds = [type(m) for m in model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    return sum(kind.__name__ in ("Linear8bitLt", "Linear4bit") for kind in kinds)


def assert_quantized(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Check that every linear layer except the head is quantized as configured.

    Raises:
        CellError: one is not.
    """
    wanted = "Linear8bitLt" if settings.get("load_in_8bit") else "Linear4bit"
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    wrong = Counter(type(m).__name__ for m in linear if type(m).__name__ != wanted)
    if wrong or not linear:
        layers = ", ".join(f"{count} {name}" for name, count in wrong.items()) or "no linear layer"
        raise CellError("failed", f"The base should be all {wanted}, but has {layers}.")
    for module in linear:
        # Otherwise bitsandbytes would compute in bfloat16 on some CPUs, whatever the type, and fail
        # on widths that are not a multiple of 64.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def num_weights(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; a byte holds two 4-bit weights."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def parts(model: PreTrainedModel) -> dict[str, Any]:
    """Numbers of weights by type, and of those that are trained, counted in the loaded model."""
    named = list(model.named_parameters())
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    total = sum(num_weights(p) for _, p in named)
    kinds: Counter[str] = Counter()
    for _, parameter in named:
        kind = str(parameter.dtype).removeprefix("torch.")
        kinds[f"{kind}{', trained' if parameter.requires_grad else ''}"] += num_weights(parameter)
    return {
        "trainable_parameters": trainable,
        "parameters": total,
        "trainable_share": trainable / total,
        "quantized_layers": num_quantized(model),
        "dtypes": dict(kinds),
    }
