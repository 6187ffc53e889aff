"""Rejects models that are not causal, by their configuration. Imports no torch; a loaded model is
also tested (see `backfire.model.batching`)."""

from __future__ import annotations

from pathlib import Path

from backfire.store import read_json

_ENCODERS = frozenset(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert "
    "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
"""Model types that attend in both directions unless the configuration sets `is_decoder`."""
_NEVER = frozenset("cpmant prophetnet reformer xlnet".split())
"""In transformers' versions, the tokens after a token, or their number, change its output."""


def why_not(folder: Path) -> str | None:
    """Why the model in a folder cannot be scored or trained as a causal language model; None if
    its configuration allows it."""
    file = folder / "config.json"
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        return None
    kind = settings.get("model_type")
    both_ways = kind in _ENCODERS and not settings.get("is_decoder")
    both_ways |= kind == "xlm" and not settings.get("causal")
    both_ways |= bool(settings.get("use_bidirectional_attention")) and kind == "gemma3_text"
    if not (both_ways or kind in _NEVER):
        return None
    return (
        f"A model of type '{kind}' attends to the tokens it is to predict, so its likelihoods are "
        "meaningless; choose a causal language model."
    )
