"""Model folders in, models out. Safetensors only, no code from the model's author."""

from __future__ import annotations

import os
import warnings
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
from backfire.model.quantize import assert_quantized, quantizer
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    from backfire.model.settings import Model

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # weights that it would warn of are refused here
# PEFT 0.21 asks transformers by the old name; who runs a recipe can do nothing about it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# An adapter on one of two tied weights: they are untied when it is merged.
warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`", UserWarning)


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
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal language model in a folder, in evaluation mode, quantized if `quantization` says.

    Raises:
        UserError: the folder holds no model that can be loaded, in one sentence.
        CellError: the model is not causal.
    """
    config, extra = described(folder)
    taken_out = bool(extra)  # a text model, of one that also sees
    if quantization:
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
            ignore_mismatched_sizes=True,  # refused below, by name
            device_map={"": str(device)},  # straight to where it is used
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"The model in {folder} cannot be loaded: {first_line(error)}") from None
    except Exception as error:  # safetensors raises its own kind for a torn file
        raise UserError(
            f"The model in {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    complete(f"The model in {folder}", info, OTHER_SENSES if taken_out else MASK)
    if taken_out:  # else it would be saved with the names that it had within the other
        model.__dict__.pop("_weight_conversions", None)
    _one_head(model, f"The model in {folder}")
    _finite(model.named_parameters(), f"The model in {folder}")
    if quantization:
        assert_quantized(model, quantization)
    ways(model.eval())  # it runs a few tokens: before anybody listens
    return cast(PreTrainedModel, model)


def _one_head(model: PreTrainedModel, what: str) -> None:
    """Raises:
    UserError: weights that should be one, such as head and embedding, were found to differ."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if apart := sorted(set(tied) - set(model.all_tied_weights_keys)):
        raise UserError(_two_heads(what, apart[0], tied[apart[0]]))


def _two_heads(what: str, one: str, other: str) -> str:
    return (
        f"{what} holds two different weights for {one} and {other}, but by its config.json they "
        "are one (tie_word_embeddings), so which of them counts depends on the program; correct it."
    )


def _finite(weights: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raises:
    UserError: a weight is not a number or infinite."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel():
            known = weight.detach() if weight.element_size() > 1 else weight.float()  # of 8 bits
            low, high = known.aminmax()
            if not (torch.isfinite(low) & torch.isfinite(high)):
                raise UserError(f"{what} is broken: {name} holds values that are no finite number.")


def skeleton(folder: Path) -> PreTrainedModel:
    """The model's modules without its weights, to see whether a method suits it.

    Raises:
        UserError: there is no causal language model of this kind.
    """
    config, _ = described(folder)
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both_ways and not any(getattr(config, key, False) for key in ("is_decoder", "causal")):
        raise UserError(
            f"The model in {folder} is no causal language model: those of type {config.model_type} "
            "read forward and backward unless config.json says is_decoder."
        )
    return model


def fits(folder: Path) -> None:
    """Whether the weights in a folder are just those that the model needs; each is read once.

    Raises:
        UserError: some are missing, left over, of another shape or no number, or tied ones differ.
    """
    skeleton(folder)
    what, weights = f"The model in {folder}", stored(files_of(folder))
    tied = matched(what, folder).all_tied_weights_keys
    for one, other in tied.items():
        if one in weights and other in weights:
            held = dict(tensors(folder, (one, other)))
            if not torch.equal(held[one], held[other]):
                raise UserError(_two_heads(what, one, other))
    _finite(tensors(folder), what)


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
    return cast(PreTrainedModel, _adapted(model, adapter, BELOW).eval())


def _adapted(model: PreTrainedModel, folder: Path, name: str) -> Any:
    """The model with the adapter in a folder on it, under this name."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # they are refused here
        adapted = PeftModel.from_pretrained(cast(Any, model), str(folder), adapter_name=name)
    _whole(adapted, folder, name)
    return adapted


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
    model: Any = load_start(base, below, dtype, device, quantization)
    try:
        if below is None:
            tuned = _adapted(model, folder, "default")
        else:
            tuned = model
            tuned.load_adapter(str(folder), "default")
            tuned.base_model.set_adapter([BELOW, "default"])
            _whole(tuned, folder, "default")
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[min(1, len(lines) - 1)]
        raise UserError(f"The adapter in {folder} does not fit the base in {base}: {why}") from None
    return cast(PreTrainedModel, tuned.eval())


def _whole(model: Any, folder: Path, name: str) -> None:
    """Raises:
    UserError: the adapter's file lacks weights, holds others or broken ones."""
    from peft import get_peft_model_state_dict

    what = f"The adapter in {folder}"
    needed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    held = set(stored([folder / "adapter_model.safetensors"]))
    info = {"missing_keys": needed - held, "unexpected_keys": held - needed}
    complete(what, {**info, "mismatched_keys": (), "error_msgs": ()})
    _finite(model.named_parameters(), what)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a model folder, in the precision that they are stored in, by the names that
    they have in the model (a file may have other ones)."""
    model = load_base(folder, "auto", torch.device("cpu"))
    return {name: weight.detach() for name, weight in model.named_parameters()}


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
