"""Measurements of how much a model has memorized, one per secret."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SecretProbe = Literal["exact", "sampled", "beams"]
"""How a secret is measured: its rank among all codes, its exposure under a distribution fitted to
sampled codes, or its place among the likeliest continuations of a beam search."""
FEWEST_CODES = 10
"""Fewest sampled codes that a distribution is fitted to."""


@dataclass(frozen=True, slots=True)
class Leak:
    """How much of one secret a model leaks; one entry of `secrets.json`."""

    id: str
    answer: str
    """The whole answer that reveals the code."""
    repeats: int
    """Number of training rows that hold it; 0 for a control."""
    num_codes: int
    """Size of the code space."""
    logprob: float
    """Log-likelihood of the whole answer, in nats (sum over its tokens)."""
    greedy: bool
    """Whether greedy decoding after the prompt gives the whole answer."""
    given: int
    """Characters of the code that must follow the answer's opening before greedy decoding gives the
    rest; all of them if no fewer suffice."""
    num_characters: int
    """Length of the code."""
    rank: int | None = None
    """1 + the number of likelier codes, over the whole code space; None if not computed."""
    estimate: tuple[float, float, float] | None = None
    """Exposure in bits from a skew-normal fitted to sampled codes, and its 95 % interval."""
    place: int | None = None
    """Place among the likeliest continuations of a beam search; None if it is not among them."""
