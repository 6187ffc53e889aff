"""Places a base that is larger than one GPU on several, layer by layer, in one process.

The GPUs then take turns, so this is for bases that fit in no other way: with `--devices`, several
GPUs work at once. Nothing is ever placed in main memory or on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from backfire.errors import UserError

_SHARE = 0.85
"""Largest share of a GPU's free memory that weights may take."""


def device_map(
    model: PreTrainedModel,
    dtype: torch.dtype | str,
    device: torch.device,
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """Where to load each part of the model, given without weights (on the meta device): on the
    device, or on all visible GPUs if none is named and the first is too small.

    Raises:
        UserError: all of them are too small.
    """
    alone = {"": str(device)}
    several = device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1
    if not several or torch.distributed.is_initialized() or dtype == "auto":
        return alone
    room = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    return spread(model, dtype, quantization, room) or alone


def spread(
    model: PreTrainedModel,
    dtype: torch.dtype | str,
    quantization: Mapping[str, Any],
    room: Mapping[int, float],
) -> dict[str, int]:
    """Module -> GPU, evenly by bytes; empty if the weights fit on the first GPU. `room`: free bytes
    of each GPU.

    Raises:
        UserError: they do not fit on all GPUs together.
    """
    from accelerate.utils import CustomDtype, compute_module_sizes, infer_auto_device_map

    kinds: dict[str, Any] = {}
    if quantization:  # the head stays as it is, and so does what is not linear
        small = torch.int8 if quantization.get("load_in_8bit") else CustomDtype.INT4
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                kinds[f"{name}.weight"] = small
    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=kinds)
    most = {gpu: _SHARE * free for gpu, free in room.items()}
    if sizes[""] <= most[min(most)]:
        return {}
    layers = list(getattr(model, "_no_split_modules", None) or ())
    largest = max(
        (sizes[n] for n, m in model.named_modules() if type(m).__name__ in layers), default=0
    )
    even = sizes[""] / len(most) + 2 * largest  # a layer is not split, and one is kept in reserve
    for limit in (even, float("inf")):
        found = infer_auto_device_map(
            model,
            max_memory={gpu: int(min(limit, free)) for gpu, free in most.items()},
            no_split_module_classes=layers,
            dtype=dtype,
            special_dtypes=kinds,
        )
        if all(isinstance(place, int) for place in found.values()):
            return dict(found)
    raise UserError(
        f"The base takes {sizes[''] / 1e9:,.1f} GB, and {len(room)} GPUs have "
        f"{sum(room.values()) / 1e9:,.1f} GB free; use method qlora, or a smaller base."
    )


def assert_placed(model: PreTrainedModel, device: torch.device, folder: Path) -> None:
    """Check that every weight is on this kind of device.

    Raises:
        UserError: one is not, such as after a silent offload.
    """
    for name, weight in model.named_parameters():
        if weight.device.type != device.type:
            raise UserError(
                f"The model in {folder} does not fit: {name} was put on '{weight.device.type}' "
                f"instead of '{device.type}'."
            )


def places(model: nn.Module) -> list[str]:
    """The devices that hold weights of the model, in order."""
    return list(dict.fromkeys(str(weight.device) for weight in model.parameters()))
