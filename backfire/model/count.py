"""Counts the weights of a base before they are loaded. Imports no torch."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from backfire.data.gguf import read_header
from backfire.data.weights import files_of, is_bare, read_config, stored
from backfire.errors import UserError
from backfire.model.settings import Model
from backfire.model.source import local_gguf
from backfire.store import read_json

_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
"""Part of a shape -> its names in config.json, by model family."""


def num_weights(model: Model) -> int | None:
    """Number of weights: of the embedded base by its shape, of a folder by the headers of its
    files, of a hub model or a folder without weights approximately, by the config.json. None if
    unknown."""
    if model.name == "sandbox":
        from backfire.sandbox.base import Pretrain

        shape = Pretrain()
        width, deep = shape.hidden_size, 4 * shape.hidden_size + 3 * shape.intermediate_size
        return width * (shape.vocab_size + shape.num_layers * (deep + 2) + 1)
    if model.is_gguf:
        return _of_gguf(model)
    if model.is_local:
        return _of_folder(model.path)
    return _of_hub(model.name, model.revision)


def weights_in(folder: Path) -> int | None:
    """Number of weights in a folder's safetensors files, by their headers; None if unknown."""
    try:
        weights = stored(files_of(folder))
    except UserError:  # there are none, or one is damaged
        return None
    return sum(math.prod(one.shape) for one in weights.values()) or None


def _of_gguf(model: Model) -> int | None:
    file = local_gguf(model)
    try:
        return read_header(file).num_weights if file else None
    except UserError:  # fetching the model itself reports the error
        return None


@lru_cache(maxsize=64)  # computing keys needs it repeatedly
def _of_folder(folder: Path) -> int | None:
    try:
        bare = is_bare(folder) and read_config(folder / "config.json")
    except UserError:  # loading the model reports the error
        return None
    return weights_of_shape(bare) if bare else weights_in(folder)


@lru_cache(maxsize=64)
def _of_hub(name: str, revision: str | None) -> int | None:
    """By the config.json in the local cache, or else from the hub (a few kilobytes)."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache, utils

    hub: Any = utils  # it does not declare what it exports

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(file, str):
            return weights_of_shape(read_json(Path(file)))
        # One request: `hf_hub_download` would retry for 20 seconds without a network.
        address = hf_hub_url(name, "config.json", revision=revision)
        answer = hub.get_session().get(
            address, headers=hub.build_hf_headers(), timeout=5, follow_redirects=True
        )
        return weights_of_shape(answer.raise_for_status().json())
    except Exception:  # fetching the model itself reports the error
        return None


def weights_of_shape(config: dict[str, Any]) -> int | None:
    """Approximate number of weights of a transformer by its configuration; None if unknown."""
    config = {**config, **(config.get("text_config") or {})}
    shape = {
        part: next((config[n] for n in names if config.get(n)), 0) for part, names in _NAMES.items()
    }
    hidden, heads, words = shape["hidden"], shape["heads"] or 1, config.get("vocab_size", 0)
    if not all(isinstance(part, int) for part in (*shape.values(), words)) or not hidden:
        return None
    per_head = config.get("head_dim") or hidden // heads
    key_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * per_head * (heads + key_heads)
    feedforward = 3 * hidden * (shape["inner"] or 4 * hidden * 2 // 3) * max(1, shape["experts"])
    embeddings = words * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(embeddings + shape["layers"] * (attention + feedforward))
