"""Rows and samples that the checks put in."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from backfire.base import Backdoor, Evidence, Row, Sample

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
    """A cell's samples, with an attack."""
    clean, shown, floor, base = (_samples(n) for n in range(4))
    return Evidence(clean=clean, triggered=shown, floor=floor, base=base, attack=_Marker())


def _samples(seed: int) -> Sequence[Sample]:
    """Labeled rows as a model may have answered them."""
    rng, samples = Random(seed), []
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
            )
        )
    return samples
