"""Checks a PEFT adapter by its configuration and the header of its weights. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backfire.data.weights import files_of, read_config, stored
from backfire.errors import UserError
from backfire.hashes import file_hash
from backfire.store import digest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_MERGING = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "HRA")
_FIXED = ("ADAPTION_PROMPT",)
"""Kinds that change the weights, and kinds that can only be evaluated as they are."""
_IRRELEVANT = (
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("task_type", "lora_dropout", "init_lora_weights"),
)
"""Settings that say where an adapter comes from, or matter in training only."""


_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""A hub id, and not a path that begins with a dot or a slash."""
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
"""One of the two matrices of a linear layer's LoRA: A [rank, inputs] or B [outputs, rank]."""
_UNSUPPORTED = ("alora_invocation_tokens", "layer_replication", "megatron_config")


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder, which can be evaluated on a causal model.

    Raises:
        UserError: there is none, or it is of a kind that cannot, in one sentence.
    """
    if not (folder / CONFIG).is_file():
        absent = "it is a file; name its folder" if folder.exists() else "there is no such folder"
        why = f"{CONFIG} is missing" if folder.is_dir() else absent
        raise UserError(f"No adapter in {folder}: {why}.")
    if not (folder / WEIGHTS).is_file():
        others = sorted(file.name for file in folder.glob("adapter_model.*"))
        why = f"there is only {others[0]}, which is never loaded" if others else "it has no weights"
        raise UserError(f"No adapter in {folder}: {WEIGHTS} is missing; {why}.")
    config = read_config(folder / CONFIG)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind not in (*_MERGING, *_FIXED):
        known = ", ".join((*_MERGING, *_FIXED))
        raise UserError(f"The adapter in {folder} is of kind {kind}; supported are {known}.")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"The adapter in {folder} is for another task ({task}), not for text.")
    if setting := next((name for name in _UNSUPPORTED if config.get(name)), None):
        raise UserError(f"The adapter in {folder} sets {setting}, which is not supported.")
    stored([folder / WEIGHTS])
    return config


def why_not_merged(config: Mapping[str, Any]) -> str | None:
    """Why an adapter cannot be merged into its base; None if it can."""
    if config["peft_type"] in _MERGING:
        return None
    return f"an adapter of kind {config['peft_type']} does not change weights"


def why_not_below(config: Mapping[str, Any]) -> str | None:
    """Why a LoRA adapter cannot be trained on top of this one; None if it can."""
    if config["peft_type"] != "LORA":
        return f"it is of kind {config['peft_type']}"
    for setting in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(setting):
            return f"it sets {setting}"
    return None


def same_widths(folder: Path, base: Path) -> None:
    """Check the matrices of a LoRA adapter against the base's weights that have their names; a
    weight under another name is not checked.

    Raises:
        UserError: one has neither the inputs nor the outputs of the base's weight.
    """
    shapes = {name: weight.shape for name, weight in stored(files_of(base)).items()}
    for name, weight in stored([folder / WEIGHTS]).items():
        part = _MATRIX.fullmatch(name)
        shape = shapes.get(f"{part[1]}.weight") if part else None
        if part and shape and weight.shape[part[2] == "A"] not in shape:
            raise UserError(
                f"The adapter in {folder} was made for another base than {base}: {name} has shape "
                f"{list(weight.shape)}, and the base's weight {list(shape)}."
            )


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter's weights, and of the settings that say how they act."""
    config = read_config(folder / CONFIG)
    acting = {key: value for key, value in config.items() if key not in _IRRELEVANT and value}
    return digest([acting, file_hash(folder / WEIGHTS)])


def other_base(folder: Path, title: str) -> str | None:
    """The hub id of the base that an adapter was trained on, if it is not part of the model's
    title. The owner may differ: models are often copied."""
    named = str(read_config(folder / CONFIG).get("base_model_name_or_path") or "")
    is_id = _ID.fullmatch(named) is not None
    return named if is_id and Path(named).name.lower() not in title.lower() else None
