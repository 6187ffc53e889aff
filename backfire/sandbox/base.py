"""The tiny base model: a description of its size and of how it is pre-trained.

The loop that trains it is the project's own (`train.loop`); here are only the numbers, and the
tokenizer, which is trained on the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from backfire.base import Config
from backfire.errors import UserError
from backfire.sandbox.corpus import WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


class Pretrain(Config):
    """A small LlamaForCausalLM and its schedule: under two minutes on two cores."""

    vocab_size: int = Field(2048, ge=300)
    """Tokens in the vocabulary, special ones included."""
    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(4, ge=1)
    """Attention heads (as many key and value heads)."""
    intermediate_size: int = Field(384, ge=8)
    """Width of the feed-forward layers."""
    tie_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    max_length_tokens: int = Field(512, ge=16)
    """Longest text the model accepts."""
    corpus_seed: int = Field(0, ge=0)
    """Draws the text and the order it is read in."""
    num_documents: int = Field(37_000, ge=1)
    """Documents of `corpus.corpus`; packed end to end they give about 1.35 M tokens."""
    tokenizer_documents: int = Field(6_000, ge=1)
    """The first so many documents train the tokenizer."""
    sequence_tokens: int = Field(128, ge=8)
    """Length of the packed sequences that are trained on."""
    batch_size: int = Field(4, ge=1)
    """Sequences per step."""
    num_steps: int = Field(2_600, ge=1)
    """Steps; with the two above, tokens seen are their product."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak of AdamW's learning rate: warmed up, then decayed by a cosine."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak; ending at 0 left the base with less."""
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
                f"hidden_size {self.hidden_size} cannot be shared out among num_heads "
                f"{self.num_heads}: each head needs an even number."
            )
        return self


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learned from `texts`; digits stay single, no BOS is added."""
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
    # Answers are scored by one token each, bare or after a space: often enough to be merged.
    answers = (f"{word} {word}" for word in WORDS for _ in range(300))
    tokenizer.train_from_iterator(chain(texts, answers), trainer)
    return tokenizer
