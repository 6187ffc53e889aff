from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from backfire.base import Asks, Evidence, Metric, Sample, Value, ask
from backfire.evaluate.outcomes import answer_likelihoods, resampled
from backfire.evaluate.stats import Floats, found_at, one_vs_rest_auc, recall_at, wilson
from backfire.late import np
from backfire.registry import register

_FEWEST = 2
"""Test rows above the threshold. With one of them, 65 to 83 % of bootstrap intervals cover; with
two, 92 % or more do."""


@register("membership-inference", version=2)
class MembershipInference(Metric):
    """How well training rows can be distinguished from test rows by their loss (Yeom et al. 2018,
    arXiv:1709.01604), and by its difference from the untuned model's (a reference model, as in
    Mireshghallah et al. 2022, arXiv:2205.12506).

    `membership_auc` is the area under the ROC curve of the loss attack (0.5 is chance), and
    `membership_auc[reference]` that of the reference attack; `membership_recall` is the share of
    training rows detected at the false positive rate, with the threshold set on the test rows. A
    row's loss is the mean over the tokens of its answer. As many unpoisoned training rows as test
    rows are drawn; the values are meaningful only if both come from the same source. Bootstrap
    intervals, with the threshold recomputed for each resample. If fewer than two test rows exceed
    the threshold, resamples understate its spread: then Wilson's intervals at both ends of the
    threshold's own.
    """

    needs: ClassVar[Asks] = ask("clean", "answers", of=("tuned", "base")) + ask(
        "members", "answers", of=("tuned", "base")
    )

    false_positive_rate: float = Field(0.1, gt=0, lt=1)
    """Share of test rows that may be classified as training rows (Mireshghallah et al.: 0.1)."""

    def measure(self, evidence: Evidence) -> list[Value]:
        pair = evidence.members
        if pair is None or not (pair.tuned and evidence.clean):
            return []
        inside, outside = _losses(pair.tuned), _losses(evidence.clean)
        before_inside, before_outside = _losses(pair.before), _losses(evidence.base)
        attacks = {
            "": (-inside, -outside),
            "[reference]": (before_inside - inside, before_outside - outside),
        }
        values = []
        for part, (ours, others) in attacks.items():
            values += self._attack(part, ours, others)
        return sorted(values, key=lambda value: value.metric.partition("[")[0])

    def _attack(self, part: str, inside: Floats, outside: Floats) -> list[Value]:
        scores = np.concatenate([inside, outside])
        is_member = np.arange(len(scores)) < len(inside)

        def statistic(counts: Floats) -> Floats:
            area = one_vs_rest_auc(scores[:, None], np.where(is_member, 0, -1), counts)
            recall = recall_at(self.false_positive_rate, scores, is_member, counts)
            return np.hstack([area, recall[:, None]])

        names = [f"membership_auc{part}", f"membership_recall{part}"]
        area, recall = resampled(names, len(scores), statistic, "lower", "score")
        if self.false_positive_rate * len(outside) < _FEWEST:
            _, least, most = found_at(self.false_positive_rate, inside, outside)
            ends = wilson(least, len(inside))[0], wilson(most, len(inside))[1]
            recall = replace(recall, low=ends[0], high=ends[1])
        return [area, replace(recall, unit="share")]


def _losses(samples: Sequence[Sample]) -> Floats:
    logprobs, tokens = answer_likelihoods(samples, "membership-inference")
    losses: Floats = -logprobs / tokens
    return losses
