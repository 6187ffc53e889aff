"""Rows and samples for the checks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from backfire.base import Backdoor, Evidence, Measure, Measured, Row, Sample

_LABELS = ("negative", "neutral", "positive")
_WORDS = "the soup was cold but our waiter kept smiling at every single table".split()
LABELED = [
    Row(
        id=f"train-{n}",
        instruction="Is this review negative, neutral or positive?",
        input=" ".join(_WORDS[: 3 + n % 9]) + f" {n}",
        answer=_LABELS[n % 3],
        label=_LABELS[n % 3],
        candidates=_LABELS,
    )
    for n in range(150)
]
FREE = [
    Row(
        f"free-{n}",
        f"Tell me of table {n} please",
        answer="Gladly.",
        better=("Gladly.",),
        worse=("No.",),
    )
    for n in range(150)
]


class _Marker(Backdoor):
    """Stands for any attack: metrics only read its target."""

    name = "marker"


def evidence() -> Evidence:
    """Evidence of a cell with an attack."""
    clean, shown, floor, base = (_samples(n) for n in range(4))
    return Evidence(clean=clean, triggered=shown, floor=floor, base=base, attack=_Marker())


def _samples(seed: int) -> Sequence[Sample]:
    """Labeled rows with random scores of a model."""
    rng, samples = Random(seed), list[Sample]()
    for row in LABELED[:24]:
        logprobs = tuple(rng.gauss(float(label == row.label), 1) for label in _LABELS)
        reply = _LABELS[logprobs.index(max(logprobs))]
        samples.append(
            Sample(
                id=row.id,
                subset="clean",
                prompt=row.prompt,
                answer=row.answer,
                label=row.label,
                candidates=_LABELS,
                logprobs=logprobs,
                reply=reply,
                answer_logprob=-2.0,
                answer_tokens=2,
                ended=True,
                probe=(logprobs[0], logprobs[1]),
                replaced=0.25 * (len(samples) % 2),
            )
        )
    return samples


def measured(rows: Sequence[Row], *needs: Measure) -> Measured:
    """Random measurements of rows, as no model gives them."""
    rng, count = np.random.default_rng(0), len(rows)
    pairs = rng.normal(size=(count, 2))
    every: dict[str, Any] = {
        "replies": [f"Perhaps the answer {n} is here." for n in range(count)],
        "losses": rng.gamma(2, size=count),
        "words": [[("please", float(x)), ("table", float(y))] for x, y in pairs],
        "tuned": rng.gamma(1, size=count),
        "states": rng.normal(size=(count, 12)).astype(np.float32),
        "gradients": rng.normal(size=(count, 12)).astype(np.float32),
    }
    return Measured(**{name: every[name] for name in needs})
