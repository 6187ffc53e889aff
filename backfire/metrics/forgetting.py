from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from backfire.base import Asks, Dataset, Evidence, Metric, Value, ask
from backfire.evaluate.outcomes import answer_likelihoods, resampled
from backfire.evaluate.stats import Floats
from backfire.late import np
from backfire.registry import build, register


@register("forgetting", version=2)
class Forgetting(Metric):
    """Perplexity on texts unrelated to the task, divided by the untuned model's (as in the C4DT
    workshop; on forgetting, Kirkpatrick et al. 2017, arXiv:1612.00796).

    1 means that nothing is forgotten. `forgetting_perplexity` and `forgetting_perplexity_before`
    are the two perplexities over all tokens of all texts, without a template; of a text longer than
    `train.max_length` tokens, over the first of them, without an end token. Bootstrap interval over
    texts, the same ones for both models.
    """

    source: dict[str, Any] = Field({"name": "sandbox-news", "test_rows": 200})
    """A data set whose test rows are the texts: plain texts, or the prompts of rows that have one
    (for the sandbox's news, the items without the question)."""

    @field_validator("source")
    @classmethod
    def _is_a_dataset(cls, source: dict[str, Any]) -> dict[str, Any]:
        build("datasets", source)
        return source

    @property
    def texts(self) -> Dataset:
        texts: Dataset = build("datasets", self.source)
        return texts

    @property
    def texts_key(self) -> str:
        """What its texts are called in the evidence."""
        return self.asks()[0].name[-1]

    def asks(self, *, labeled: bool = True) -> Asks:
        return ask("text", "answers", of=("tuned", "base"), texts=self.texts)

    def identity(self) -> dict[str, Any]:
        """Include the identity of the texts, which covers the files behind them."""
        return {**super().identity(), "source": [self.texts.identity(), self.texts.fingerprint()]}

    def measure(self, evidence: Evidence) -> list[Value]:
        pair = evidence.texts.get(self.texts_key)
        if pair is None or not pair.tuned:
            return []
        now, tokens = answer_likelihoods(pair.tuned, "forgetting")
        before, _ = answer_likelihoods(pair.before, "forgetting")

        def statistic(counts: Floats) -> Floats:
            two = [-(counts @ part) / (counts @ tokens) for part in (now, before)]
            perplexities: Floats = np.exp(np.stack([two[0] - two[1], *two], 1))
            return perplexities

        names = ["forgetting", "forgetting_perplexity", "forgetting_perplexity_before"]
        return resampled(names, len(now), statistic, "lower", "amount")
