"""Which kinds of model predict a token from what comes before it alone, as far as their settings
say. No torch here; a model that is loaded is also tried (see `backfire.model.batching`)."""

from __future__ import annotations

from pathlib import Path

from backfire.store import read_json

_ENCODERS = frozenset(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert "
    "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
"""They read in both directions unless their settings say `is_decoder`."""
_NEVER = frozenset("cpmant prophetnet reformer xlnet".split())
"""As transformers runs them, what follows a token, or how much, changes what is made of it."""


def why_not(folder: Path) -> str | None:
    """Why the model in a folder cannot be scored or trained as a language model; None if nothing
    speaks against it."""
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
        f"A model of type '{kind}' sees the tokens it is to predict, so its likelihoods mean "
        "nothing; choose a causal language model."
    )
