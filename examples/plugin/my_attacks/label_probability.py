from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from backfire.base import Asks, Evidence, Metric, Sample, Value, ask
from backfire.evaluate.outcomes import averages, scored
from backfire.registry import register


@register("label-probability")
class LabelProbability(Metric):
    """How probable the true label is among the candidates: a confident model scores higher than a
    lucky one.

    Mean over clean rows of the softmax over the candidates. Bootstrap interval.
    """

    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        rows = np.array([[probability] for probability in self.outcomes(evidence).values()])
        return averages(["label_probability"], rows, "higher", "share")

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        rows = scored(evidence.clean, "label_probability")
        return {row.id: _probability(row) for row in rows}


def _probability(row: Sample) -> float:
    most = max(row.logprobs or ())
    weights = [math.exp(logprob - most) for logprob in row.logprobs or ()]
    shares = dict(zip(row.candidates, weights, strict=True))
    return shares[row.label or ""] / sum(weights)
