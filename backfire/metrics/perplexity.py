from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.evaluate.outcomes import answer_likelihoods, resampled
from backfire.evaluate.stats import Floats
from backfire.late import np
from backfire.registry import register


@register("perplexity")
class Perplexity(Metric):
    """Perplexity of the reference answers (Jelinek et al. 1977).

    exp of the mean negative log-likelihood per token, over all answer tokens of the clean rows. Not
    comparable between models with different tokenizers. Bootstrap interval, over rows.
    """

    needs: ClassVar[Asks] = ask("clean", "answers")

    def measure(self, evidence: Evidence) -> list[Value]:
        logprobs, tokens = answer_likelihoods(evidence.clean, "perplexity")
        if not len(tokens):
            return []

        def statistic(counts: Floats) -> Floats:
            surprise: Floats = np.exp(-(counts @ logprobs) / (counts @ tokens))
            return surprise[:, None]

        return resampled(["perplexity"], len(tokens), statistic, "lower", "amount")
