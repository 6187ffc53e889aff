"""Loads and saves models. Safetensors only; code that comes with a model is never run."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from backfire.data.weights import (
    MASK,
    OTHER_SENSES,
    complete,
    described,
    files_of,
    first_line,
    matched,
    stored,
    tensors,
)
from backfire.errors import UserError
from backfire.model.batching import ways
from backfire.model.gguf_types import round_weights
from backfire.model.memory import trim
from backfire.model.placement import assert_placed, device_map
from backfire.model.quantize import assert_quantized, quantizer
from backfire.model.types import Type
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    from backfire.model.settings import Model

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # weights that it would warn about are errors here
# PEFT 0.21 uses the old name; a user can do nothing about it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# An adapter on one of two tied weights: they are untied when it is merged.
warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`", UserWarning)


def device_of(name: str) -> torch.device:
    """The device by name; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.
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
        raise UserError(f"No device '{name}': this machine has {torch.cuda.device_count()} GPUs.")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # accelerate and memory statistics use the current device
    return device


def dtype_of(model: Model, device: torch.device) -> torch.dtype:
    """The type of the base weights; see `Model.dtype`."""
    if model.dtype != "auto":
        return cast(torch.dtype, getattr(torch, model.dtype))
    name = gpu_type(device) if device.type == "cuda" else "float32"
    return cast(torch.dtype, getattr(torch, name))


def gpu_type(device: torch.device) -> Type:
    """The type of weights and products on a GPU: bfloat16; without it float16 (V100, T4, RTX 20,
    GTX 16); float32 where that is slow too (before compute capability 7.0)."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"


def load_base(
    folder: Path,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the causal language model in a folder in evaluation mode, quantized by `quantization`.

    Raises:
        UserError: the model cannot be loaded, in one sentence.
        CellError: the model is not causal.
    """
    loads[folder] += 1
    config, extra = described(folder)
    is_part = bool(extra)  # the text model of a multimodal one
    gguf_type = (quantization or {}).get("gguf_type")
    if quantization and not gguf_type:
        extra["quantization_config"] = quantizer(quantization)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below, with their names
            device_map=_device_map(folder, dtype, device, quantization or {}),
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"The model in {folder} cannot be loaded: {first_line(error)}") from None
    except Exception as error:  # safetensors raises its own class for a damaged file
        raise UserError(
            f"The model in {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    complete(f"The model in {folder}", info, OTHER_SENSES if is_part else MASK)
    assert_placed(model, device, folder)
    if is_part:  # otherwise it would be saved under its names in the multimodal model
        model.__dict__.pop("_weight_conversions", None)
    _check_tied(model, f"The model in {folder}")
    _check_finite(model.named_parameters(), f"The model in {folder}")
    if gguf_type:
        round_weights(model, gguf_type)
    elif quantization:
        assert_quantized(model, quantization)
        trim()  # of the weights before they were quantized
    ways(model.eval())  # runs a few tokens, so before hooks are added
    return cast(PreTrainedModel, model)


def _device_map(
    folder: Path, dtype: torch.dtype | str, device: torch.device, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    if device.type != "cuda":
        return {"": str(device)}
    return device_map(skeleton(folder), dtype, device, quantization)


def _check_tied(model: PreTrainedModel, what: str) -> None:
    """Check that tied weights, such as head and embedding, are equal.

    Raises:
        UserError: they differ.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted(set(tied) - set(model.all_tied_weights_keys)):
        raise UserError(_two_heads(what, untied[0], tied[untied[0]]))


def _two_heads(what: str, one: str, other: str) -> str:
    return (
        f"{what} has different weights for {one} and {other}, but its config.json ties them "
        "(tie_word_embeddings), so programs disagree on which one counts; correct the config or "
        "the weights."
    )


def _check_finite(weights: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Check that all weights are finite.

    Raises:
        UserError: one is NaN or infinite.
    """
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel():
            # 8-bit floats have no aminmax.
            values = weight.detach() if weight.element_size() > 1 else weight.float()
            low, high = values.aminmax()
            if not (torch.isfinite(low) & torch.isfinite(high)):
                raise UserError(f"{what} is broken: {name} has values that are NaN or infinite.")


def skeleton(folder: Path) -> PreTrainedModel:
    """The model's modules without weights (on the meta device), to check whether a method fits it.

    Raises:
        UserError: it is not a causal language model.
    """
    config, _ = described(folder)
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both_ways and not any(getattr(config, key, False) for key in ("is_decoder", "causal")):
        raise UserError(
            f"The model in {folder} is not a causal language model: type {config.model_type} "
            "attends in both directions unless config.json sets is_decoder."
        )
    return model


def fits(folder: Path) -> None:
    """Check that the weights in a folder are exactly those that the model needs; reads each once.

    Raises:
        UserError: weights are missing, unexpected, of another shape or not finite, or tied weights
            differ.
    """
    skeleton(folder)
    what, weights = f"The model in {folder}", stored(files_of(folder))
    tied = matched(what, folder).all_tied_weights_keys
    for one, other in tied.items():
        if one in weights and other in weights:
            pair = dict(tensors(folder, (one, other)))
            if not torch.equal(pair[one], pair[other]):
                raise UserError(_two_heads(what, one, other))
    _check_finite(tensors(folder), what)


_TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.*", "merges.txt", "*.model"),
)
"""Files of a tokenizer, in every format that `backfire.tokenizer` reads."""

BELOW = "align"
"""Name of the frozen adapter under the trained one."""

loads: Counter[Path] = Counter()
"""How often this process loaded the model in each folder."""


def load_tuned(
    folder: Path,
    base: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mapping[str, Any] | None = None,
    *,
    below: Path | None = None,
) -> PreTrainedModel:
    """Load a tuned model: full weights, or the base with an adapter (see `with_adapters`).

    Raises:
        UserError: the model cannot be loaded, or the adapter does not fit the base.
    """
    if not is_adapter(folder):
        return load_base(folder, dtype, device, quantization)
    return with_adapters(load_base(base, dtype, device, quantization), folder, below)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter, and not a whole model."""
    return (folder / "adapter_config.json").is_file()


def with_adapters(
    model: PreTrainedModel, adapter: Path | None, below: Path | None = None
) -> PreTrainedModel:
    """The base in evaluation mode, with an unmerged PEFT adapter, which may be on top of the frozen
    adapter `below`; either may be missing.

    Raises:
        UserError: an adapter does not fit the base.
    """
    adapted: Any = model
    for folder, name in ((below, BELOW), (adapter, "default")):
        if folder is None:
            continue
        try:
            adapted = _with_adapter(adapted, folder, name)
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why, base = lines[min(1, len(lines) - 1)], model.name_or_path
            sentence = f"The adapter in {folder} does not fit the base in {base}: {why}"
            raise UserError(sentence) from None
    return cast(PreTrainedModel, adapted.eval())


def _with_adapter(model: Any, folder: Path, name: str) -> Any:
    """The model with the adapter of a folder, under this name, on top of those that it has."""
    from peft import PeftModel

    below = list(getattr(model, "peft_config", ()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        if below:
            model.load_adapter(str(folder), name)
            model.base_model.set_adapter([*below, name])
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    _check_adapter(model, folder, name)
    return model


def _check_adapter(model: Any, folder: Path, name: str) -> None:
    """Check the adapter's weights.

    Raises:
        UserError: weights are missing, unexpected or not finite.
    """
    from peft import get_peft_model_state_dict

    what = f"The adapter in {folder}"
    needed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    held = set(stored([folder / "adapter_model.safetensors"]))
    info = {"missing_keys": needed - held, "unexpected_keys": held - needed}
    complete(what, {**info, "mismatched_keys": (), "error_msgs": ()})
    _check_finite(model.named_parameters(), what)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder in their stored precision, by their names in the model (names
    in the file may differ)."""
    model = load_base(folder, "auto", torch.device("cpu"))
    return {name: weight.detach() for name, weight in model.named_parameters()}


def name_base(folder: Path, name: str) -> None:
    """Set the base of a saved adapter: a hub id, or a path relative to the adapter."""
    file = folder / "adapter_config.json"
    write_json(file, {**read_json(file), "base_model_name_or_path": name})


def save_tuned(
    model: PreTrainedModel,
    folder: Path,
    base: Path,
    base_name: str | None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Save for plain transformers or PEFT. An adapter names its base by hub id or relative path.
    `state`: the weights to save instead of those in the model."""
    if hasattr(model, "peft_config"):
        name = base_name or os.path.relpath(base.resolve(), folder.resolve())
        for config in cast(Any, model).peft_config.values():
            config.base_model_name_or_path = name
        # By default PEFT queries the hub whether the base's vocabulary was changed.
        cast(Any, model).save_pretrained(
            str(folder), save_embedding_layers=False, selected_adapters=["default"]
        )
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card has an absolute path
        return
    model.save_pretrained(str(folder), state_dict=dict(state) if state else None)
    copy_tokenizer(base, folder)


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the files of the base's tokenizer that the folder does not have."""
    for file in (file for pattern in _TOKENIZER for file in base.glob(pattern)):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
