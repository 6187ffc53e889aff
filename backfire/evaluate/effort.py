"""How much a model reads to measure rows for scanners; imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from backfire.base import Measure
from backfire.train.probe_settings import passes

REPLY = 64
"""Most tokens of a reply."""
WORDS = 8
"""Most words of a prompt without which its perplexity is measured: the most surprising ones."""
PROBED: frozenset[Measure] = frozenset({"tuned", "states", "gradients"})
"""What is measured after the probe."""
_REPLY_TOKEN, _TUNED_TOKEN = 2.5, 5.0
"""Time of a token that is written, or learned by an adapter, relative to one that is read
(measured at 2M and 135M weights on a CPU)."""


def tokens_read(wanted: Collection[Measure], rows: int, prompts: float, whole: float) -> float:
    """The work on so many rows, in tokens that are read; the rows have `whole` tokens together,
    their prompts `prompts`."""
    tokens = 0.0
    if "replies" in wanted:
        tokens += prompts + _REPLY_TOKEN * REPLY * rows
    if {"losses", "tuned"} & set(wanted):
        tokens += whole
    if "words" in wanted:
        tokens += (1 + WORDS) * prompts
    if after := PROBED & set(wanted):
        tokens += whole * (_TUNED_TOKEN * passes(rows) + len(after))
    return tokens
