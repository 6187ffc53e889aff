from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.errors import CellError
from backfire.evaluate.outcomes import resampled
from backfire.evaluate.stats import Floats
from backfire.registry import register


@register("perplexity")
class Perplexity(Metric):
    """Perplexity of the reference answers (Jelinek et al. 1977).

    exp of the mean negative log-likelihood per token, over all answer tokens of the clean rows. Not
    comparable between models with different tokenizers. Bootstrap interval, over rows.
    """

    needs: ClassVar[Asks] = ask("clean", "answers")

    def measure(self, evidence: Evidence) -> list[Value]:
        rows = [row for row in evidence.clean if row.answer]
        measured = [(row.answer_logprob, row.answer_tokens) for row in rows]
        known = [
            (logprob, tokens) for logprob, tokens in measured if logprob is not None and tokens
        ]
        if missing := len(rows) - len(known):
            sentence = f"requires the answers' likelihoods; {missing} of {len(rows)} rows lack it."
            raise CellError("bad-data", f"perplexity {sentence}")
        if broken := sum(not math.isfinite(logprob) for logprob, _ in known):
            raise CellError(
                "nan", f"perplexity: {broken} of {len(rows)} answers have no finite log-likelihood."
            )
        if not known:
            return []
        logprobs, tokens = np.array(known, dtype=np.float64).T

        def statistic(counts: Floats) -> Floats:
            surprise: Floats = np.exp(-(counts @ logprobs) / (counts @ tokens))
            return surprise[:, None]

        return resampled(["perplexity"], len(rows), statistic, "lower", "amount")
