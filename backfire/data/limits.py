"""A model's limits by its config.json: vocabulary size and number of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfire.data.weights import read_config
from backfire.errors import CellError, UserError

_LEARNED = {
    *("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "openai-gpt", "opt", "biogpt", "ctrl"),
    *("bart", "mbart", "bert", "bert-generation", "roberta", "electra", "xlm-roberta", "camembert"),
    *("imagegpt", "trocr", "plbart", "pegasus", "blenderbot", "blenderbot-small", "marian"),
    *("megatron-bert", "ernie", "rembert", "data2vec-text", "xmod", "prophetnet", "cpmant"),
    *("big_bird", "bigbird_pegasus", "mvp", "roformer", "xlm", "xlm-roberta-xl", "roc_bert", "mpt"),
    *("roberta-prelayernorm", "whisper", "git"),
}
"""Model types with a table of positions (learned or computed once), which cannot exceed it. Others
use rotary or relative positions and only degrade."""
_BEHIND_PADDING = {
    *("roberta", "xlm-roberta", "camembert", "data2vec-text", "xmod", "xlm-roberta-xl"),
    *("roberta-prelayernorm",),
}
"""Model types that count positions from the id of their padding token: of 514 positions, 512 are
for tokens."""


@dataclass(frozen=True)
class Limits:
    """Limits of a model; None where there is none or it is unknown."""

    vocab_size: int | None = None
    """Number of rows of the embedding."""
    positions: int | None = None
    """Maximum number of tokens, or the number that the model was trained for."""
    hard: bool = False
    """Whether `positions` cannot be exceeded."""

    def has_room(self, ids: Sequence[int], reply: int = 0) -> bool:
        """Whether the model has positions for these tokens and up to `reply` generated ones."""
        return not self.hard or self.positions is None or len(ids) + reply <= self.positions

    def check(self, name: str, ids: Sequence[int], *, reply: int = 0) -> None:
        """Check a row's tokens, followed by up to `reply` generated ones.

        Raises:
            CellError: they exceed a limit.
        """
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            raise CellError(
                "bad-data",
                f"Row {name} has the token id {max(ids)}, but the model's embedding ends at "
                f"{self.vocab_size - 1}: its tokenizer has tokens that were added and never "
                "trained; resize and train the model's embedding, or use its own tokenizer or "
                "another template.",
            )
        if not self.has_room(ids, reply):
            assert self.positions is not None
            new = f" and may get {reply} new ones" if reply else ""
            advice = f"set train.max_length to at most {self.positions - reply}"
            if self.positions > len(ids):
                fewer = self.positions - len(ids)
                advice = f"set evaluation.max_new_tokens to at most {fewer}, or {advice[4:]}"
            if reply >= self.positions:
                advice = f"set evaluation.max_new_tokens below {self.positions}"
            raise CellError(
                "bad-data",
                f"Row {name} has {len(ids)} tokens{new}, but the model has {self.positions} "
                f"positions; {advice}.",
            )


def read_limits(folder: Path) -> Limits:
    """Limits of the model in a folder, or of the text part of a multimodal one."""
    try:
        config = read_config(folder / "config.json")
    except UserError:
        return Limits()
    inner: Any = next((config[k] for k in _INNER if isinstance(config.get(k), dict)), {})
    whole = {**config, **inner}
    kind = str(whole.get("model_type", ""))
    positions = next((whole[k] for k in _POSITIONS if _count(whole.get(k))), None)
    if positions and kind in _BEHIND_PADDING:
        padding = whole.get("pad_token_id")
        positions -= 1 + (padding if type(padding) is int else 1)
    vocab_size = whole.get("vocab_size")
    return Limits(vocab_size if _count(vocab_size) else None, positions, kind in _LEARNED)


_INNER = ("text_config", "llm_config", "language_config", "decoder")
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "n_ctx"),
    *("max_seq_len", "max_target_positions"),  # of MPT, of Whisper
)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0
