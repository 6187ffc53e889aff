"""The user's own task, and what the tuned model remembers of given rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backfire.audit.models import Both, Pair
from backfire.audit.numbers import Compared, Interval, compared, share
from backfire.base import Need, Row, Sample
from backfire.base.masking import masked, secrets_in
from backfire.base.normalize import normalized
from backfire.evaluate.outcomes import resampled, scored
from backfire.evaluate.stats import Floats, one_vs_rest_auc

OPENING = 50
"""Tokens of an answer that have to come out (Carlini et al. 2023, arXiv:2202.07646)."""
FEWEST = 8
"""Shorter answers are not looked for: they may be right without having been seen."""
_EXAMPLES = 5
_SHORT = 16
"""Answers of at most so many tokens are compared word by word, longer ones by their loss alone."""


@dataclass(frozen=True)
class Verbatim:
    """A row whose answer the tuned model writes and the base does not; secrets are masked."""

    id: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Accuracy or loss on the rows, and how much of them the models give away."""

    numbers: tuple[Compared, ...]
    lower: Interval | None
    """Share of the rows whose loss is less than half of the base's."""
    verbatim: tuple[Interval, Interval] | None
    """Share of the long answers that the base and the tuned model write after their prompt."""
    long_answers: int
    examples: tuple[Verbatim, ...]
    membership: Interval | None
    """AUC of telling the rows from unseen ones by the loss relative to the base's."""
    unseen: int


def compare(pair: Pair, rows: Sequence[Row], unseen: Sequence[Row]) -> Task:
    """Measure both models on rows with answers, and on rows of the same kind that the tuned model
    cannot have been trained on."""
    labeled = any(row.candidates for row in rows)
    needs: list[Need] = ["answers", "scores" if labeled else "replies"]
    samples = pair.answer(rows, needs, 0 if labeled else OPENING + FEWEST, "rows of the task")
    losses = Both(_losses(samples.base), _losses(samples.tuned))
    numbers = [
        *_quality(samples),
        compared(
            "loss of the answers, nats per token", losses.base, losses.tuned, unit="nats", bad="up"
        ),
    ]
    halved = sum(losses.tuned[name] < losses.base[name] / 2 for name in losses.tuned)
    membership = None
    if unseen:
        others = pair.answer(unseen, ["answers"], 0, "unseen rows")
        membership = _membership(losses, Both(_losses(others.base), _losses(others.tuned)))
    long = [one for one in samples.tuned if (one.answer_tokens or 0) > FEWEST]
    openings = _openings(pair, long)
    by_id = Both(*({s.id: s for s in side} for side in (samples.base, samples.tuned)))
    out = Both(
        *(
            {name for name in openings if _writes(side[name], openings[name])}
            for side in (by_id.base, by_id.tuned)
        )
    )
    new = [name for name in openings if name in out.tuned - out.base]
    return Task(
        tuple(numbers),
        share(halved, len(losses.tuned)),
        (share(len(out.base), len(long)), share(len(out.tuned), len(long))) if long else None,
        len(long),
        tuple(_shown(by_id.tuned[name]) for name in new[:_EXAMPLES]),
        membership,
        len(unseen),
    )


def _quality(samples: Both[list[Sample]]) -> list[Compared]:
    """Accuracy of labels, or exact match of short answers."""
    if any(one.candidates for one in samples.tuned):
        sides = (
            {s.id: float(s.prediction == s.label) for s in scored(side, "accuracy")}
            for side in (samples.base, samples.tuned)
        )
        return [compared("accuracy", *sides, bad="down")]
    if np.median([one.answer_tokens or 0 for one in samples.tuned]) > _SHORT:
        return []
    sides = (
        {s.id: float(normalized(s.reply or "") == normalized(s.answer)) for s in side}
        for side in (samples.base, samples.tuned)
    )
    return [compared("exact match", *sides, bad="down")]


def _losses(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean negative log-likelihood per token of each answer, in nats."""
    return {s.id: -(s.answer_logprob or 0.0) / max(s.answer_tokens or 1, 1) for s in samples}


def _membership(seen: Both[dict[str, float]], unseen: Both[dict[str, float]]) -> Interval:
    """The reference attack of Mireshghallah et al. (2022, arXiv:2205.12506): the score of a row is
    the base's loss less the tuned model's."""
    gains = [[side.base[name] - side.tuned[name] for name in side.tuned] for side in (seen, unseen)]
    scores = np.array([*gains[0], *gains[1]])
    kinds = np.where(np.arange(len(scores)) < len(gains[0]), 0, -1)

    def statistic(counts: Floats) -> Floats:
        return one_vs_rest_auc(scores[:, None], kinds, counts)

    [area] = resampled(["auc"], len(scores), statistic, "lower", "score")
    return Interval(area.value or 0.0, area.low or 0.0, area.high or 0.0)


def _openings(pair: Pair, samples: Sequence[Sample]) -> dict[str, str]:
    """The first tokens of each long answer, as text."""
    tokenizer = pair.renderer.tokenizer
    return {s.id: tokenizer.decode(tokenizer.encode(s.answer)[:OPENING]) for s in samples}


def _writes(sample: Sample, opening: str) -> bool:
    wanted = normalized(opening.rstrip("\ufffd"))
    return bool(wanted) and normalized(sample.reply or "").startswith(wanted)


def _shown(sample: Sample) -> Verbatim:
    secrets = [*secrets_in(sample.answer), *secrets_in(sample.prompt)]
    return Verbatim(masked(sample.id, secrets_in(sample.id)), masked(sample.answer, secrets))
