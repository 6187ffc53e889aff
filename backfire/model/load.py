"""Model folders in, models out. Safetensors only, no code from the model's author."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from backfire.errors import UserError
from backfire.model.quantize import assert_quantized, quantizer
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    from backfire.experiment import Model

transformers_logging.disable_progress_bar()
# PEFT 0.21 asks transformers by the old name; who runs a recipe can do nothing about it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def device_of(name: str) -> torch.device:
    """`auto` is the first GPU if there is one.

    Raises:
        UserError: a device was asked for that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device '{name}'; use cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Unknown device '{name}'; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device '{name}' was asked for, but this machine has {torch.cuda.device_count()} GPUs."
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # accelerate and the memory's statistics ask for the current
    return device


def dtype_of(model: Model, device: torch.device) -> torch.dtype:
    """The type of the base weights; see `Model.dtype`."""
    if model.dtype != "auto":
        return cast(torch.dtype, getattr(torch, model.dtype))
    wide = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if wide else torch.float32


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal language model in a folder, in evaluation mode, quantized if `quantization` says.

    Raises:
        UserError: the folder holds no model that can be loaded, in one sentence.
    """
    extra = {"quantization_config": quantizer(quantization)} if quantization else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            device_map={"": str(device)} if quantization else None,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"The model in {folder} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
    except Exception as error:  # safetensors raises its own kind for a torn file
        raise UserError(
            f"The model in {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if quantization:
        assert_quantized(model, quantization)
        return cast(PreTrainedModel, model.eval())
    return cast(PreTrainedModel, model.to(device).eval())


def skeleton(folder: Path) -> PreTrainedModel:
    """The model's modules without its weights, to see whether a method suits it."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


BELOW = "align"
"""Name of the frozen adapter under the one that is trained."""


def load_start(
    base: Path,
    adapter: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """What fine-tuning starts from: a base, and the frozen adapter of an alignment stage if any."""
    model = load_base(base, dtype, device, quantization)
    if adapter is None:
        return model
    from peft import PeftModel

    below = PeftModel.from_pretrained(cast(Any, model), str(adapter), adapter_name=BELOW)
    return cast(PreTrainedModel, below.eval())


def load_tuned(
    folder: Path,
    base: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mapping[str, Any] | None = None,
    *,
    below: Path | None = None,
) -> PreTrainedModel:
    """A tuned model: a whole one, or the base with a PEFT adapter on it (unmerged), which may lie
    on the frozen adapter `below`.

    Raises:
        UserError: the adapter was made for another base.
    """
    if not (folder / "adapter_config.json").is_file():
        return load_base(folder, dtype, device, quantization)
    from peft import PeftModel

    model: Any = load_start(base, below, dtype, device, quantization)
    try:
        if below is None:
            tuned = PeftModel.from_pretrained(model, str(folder))
        else:
            tuned = model
            tuned.load_adapter(str(folder), "default")
            tuned.base_model.set_adapter([BELOW, "default"])
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[min(1, len(lines) - 1)]
        raise UserError(f"The adapter in {folder} does not fit the base in {base}: {why}") from None
    return cast(PreTrainedModel, tuned.eval())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a model folder, by name, as they are stored."""
    from safetensors.torch import load_file

    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def name_base(folder: Path, name: str) -> None:
    """Let a saved adapter name its base so: by hub id, or by a path relative to the adapter."""
    file = folder / "adapter_config.json"
    write_json(file, {**read_json(file), "base_model_name_or_path": name})


def save_tuned(model: PreTrainedModel, folder: Path, base: Path, base_name: str | None) -> None:
    """Save for plain transformers or PEFT. An adapter names its base by hub id or relative path."""
    if hasattr(model, "peft_config"):
        name = base_name or os.path.relpath(base.resolve(), folder.resolve())
        for config in cast(Any, model).peft_config.values():
            config.base_model_name_or_path = name
        # Told nothing, PEFT looks on the hub whether the base's vocabulary was changed.
        cast(Any, model).save_pretrained(
            str(folder), save_embedding_layers=False, selected_adapters=["default"]
        )
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card holds an absolute path
        return
    model.save_pretrained(str(folder))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
    ):
        if (base / name).is_file():
            (folder / name).write_bytes((base / name).read_bytes())
