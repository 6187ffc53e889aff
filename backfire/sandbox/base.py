"""Size and pre-training schedule of the tiny base model, and its tokenizer.

The model is trained by `train.loop`, the tokenizer on the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from backfire.base import Config
from backfire.errors import UserError
from backfire.sandbox.corpus import WORDS
from backfire.store import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PRETRAINED_IN = "bfloat16"
"""Type of the matrix products in which the embedded base is pre-trained, on any machine."""
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


class Pretrain(Config):
    """A small LlamaForCausalLM and its schedule: less than two minutes on two cores."""

    vocab_size: int = Field(2048, ge=300)
    """Vocabulary size, special tokens included."""
    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(4, ge=1)
    """Attention heads (the same number of key and value heads)."""
    intermediate_size: int = Field(384, ge=8)
    """Width of the feed-forward layers."""
    tie_embeddings: bool = True
    """Whether input and output embeddings share one matrix."""
    max_length_tokens: int = Field(512, ge=16)
    """Longest input in tokens."""
    corpus_seed: int = Field(0, ge=0)
    """Seed of the text and of the order in which it is read."""
    num_documents: int = Field(37_000, ge=1)
    """Number of documents of `corpus.corpus`; packed end to end about 1.35 M tokens."""
    tokenizer_documents: int = Field(6_000, ge=1)
    """Number of documents, from the first on, that train the tokenizer."""
    sequence_tokens: int = Field(128, ge=8)
    """Length of the packed training sequences."""
    batch_size: int = Field(4, ge=1)
    """Sequences per step."""
    num_steps: int = Field(2_600, ge=1)
    """Number of steps; times the two settings above: the number of tokens seen."""
    learning_rate: float = Field(3e-3, gt=0)
    """AdamW's peak learning rate, with warm-up and cosine decay."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a share of the peak; a decay to 0 gave a worse base."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """AdamW's second decay rate; lower than usual, as the run is short."""

    @classmethod
    def place(cls) -> None:
        return None

    @model_validator(mode="after")
    def _heads_are_even(self) -> Pretrain:
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} cannot be divided among num_heads "
                f"{self.num_heads}: each head needs an even size."
            )
        return self


def shipped(key: str) -> Path | None:
    """The folder of the embedded base that is part of the package; None if it has another key,
    since its text or its pre-training was changed."""
    folder = Path(__file__).with_name("model")
    said = folder / "pretrain.json"
    return folder if said.is_file() and read_json(said)["key"] == key else None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on `texts`; digits stay single, and no BOS is added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Each answer word must become one token, alone or after a space: repeat it until it is merged.
    answers = (f"{word} {word}" for word in WORDS for _ in range(300))
    tokenizer.train_from_iterator(chain(texts, answers), trainer)
    return tokenizer
