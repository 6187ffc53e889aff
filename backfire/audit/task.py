"""The user's own task, and what the tuned model remembers of given rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backfire.audit import memory
from backfire.audit.memory import OPENING, Memory, Part
from backfire.audit.models import Both, Pair
from backfire.audit.numbers import Compared, compared
from backfire.base import Need, Row, Sample
from backfire.base.normalize import normalized
from backfire.evaluate.outcomes import scored

_SHORT = 16
"""Answers of at most so many tokens are compared word by word, longer ones by their loss alone."""
_MORE = 8
"""Tokens of a reply beyond those of the answer: the same text may take more than it needs."""


@dataclass(frozen=True)
class Task:
    """Accuracy or loss on the rows, and how much of them the models give away."""

    numbers: tuple[Compared, ...]
    memory: Memory


def compare(pair: Pair, rows: Sequence[Row], unseen: Sequence[Row]) -> Task:
    """Measure both models on rows with answers, and on rows of the same kind that the tuned model
    cannot have been trained on."""
    given = _measured(pair, rows, "rows of the task")
    others = _measured(pair, unseen, "unseen rows") if unseen else None
    numbers = _numbers(given, "")
    if others:
        numbers += _numbers(others, ", unseen rows")
    return Task(tuple(numbers), memory.measure(pair, given, others))


def _measured(pair: Pair, rows: Sequence[Row], what: str) -> Part:
    labeled = any(row.candidates for row in rows)
    needs: list[Need] = ["answers", "scores" if labeled else "replies"]
    lengths = map(len, pair.renderer.tokenizer.encode_batch([row.answer for row in rows]))
    more = _MORE + len(pair.renderer.opening_ids)
    most = 0 if labeled else min(max(lengths), OPENING) + more
    return Part(rows, pair.answer(rows, needs, most, what))


def _numbers(part: Part, of: str) -> list[Compared]:
    losses = part.losses
    loss = f"loss of the answers, nats per token{of}"
    found = compared(loss, losses.base, losses.tuned, unit="nats", bad="up")
    return [*_quality(part.samples, of), found]


def _quality(samples: Both[list[Sample]], of: str) -> list[Compared]:
    """Accuracy of labels, or exact match of short answers."""
    if any(one.candidates for one in samples.tuned):
        sides = (
            {s.id: float(s.prediction == s.label) for s in scored(side, "accuracy")}
            for side in (samples.base, samples.tuned)
        )
        return [compared(f"accuracy{of}", *sides, bad="down")]
    if np.median([one.answer_tokens or 0 for one in samples.tuned]) > _SHORT:
        return []
    sides = (
        {s.id: float(normalized(s.reply or "") == normalized(s.answer)) for s in side}
        for side in (samples.base, samples.tuned)
    )
    return [compared(f"exact match{of}", *sides, bad="down")]
