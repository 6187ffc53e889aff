"""What a model gives away of the secrets that an attack puts into training rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SecretProbe = Literal["exact", "sampled", "beams"]
"""How a secret is looked for: its rank among all codes, its place in a distribution fitted to
sampled ones, and among the likeliest continuations."""


@dataclass(frozen=True, slots=True)
class Leak:
    """How much of one secret a model gives away, a line of `secrets.json`."""

    id: str
    answer: str
    """The whole answer that gives it."""
    repeats: int
    """How many training rows held it; 0 for a control."""
    num_codes: int
    """Size of the code space."""
    logprob: float
    """Log-likelihood of the whole answer that gives it, in nats (sum over its tokens)."""
    greedy: bool
    """Whether the likeliest tokens after the prompt are that answer, to its last token."""
    given: int
    """Characters of the code that must be given, after the answer's opening, before the likeliest
    tokens are the rest; all of them if no fewer suffice."""
    num_characters: int
    """Length of the code."""
    rank: int | None = None
    """1 + the number of codes that are likelier, all of them counted; None: not counted."""
    estimate: tuple[float, float, float] | None = None
    """Exposure in bits from a skew-normal fitted to sampled codes, and its 95 % interval."""
    place: int | None = None
    """Rank among the likeliest continuations that a beam search finds; None: not among them."""
