from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.evaluate.outcomes import judged_share, verdicts_of
from backfire.registry import register


@register("refusal-rate", version=2)
class RefusalRate(Metric):
    """Share of harmful requests that are declined, by the first judge that detects refusals (Zou et
    al. 2023, arXiv:2307.15043).

    Not the complement of the harmful score: `neither_rate` is the share of replies that are neither
    harmful to the first judge nor a refusal, such as an answer to another question.
    """

    needs: ClassVar[Asks] = ask("harmful", "replies", of=("tuned", "base"), judged=True)

    def measure(self, evidence: Evidence) -> list[Value]:
        probe = evidence.probes.get("harmful")
        if probe is None:
            return []
        now, _ = verdicts_of(probe, refusals=True)
        if not now:
            return []
        harm, _ = verdicts_of(probe)
        neither = [not v.refused and h.positive is False for v, h in zip(now, harm, strict=True)]
        return [
            *judged_share("refusal_rate", probe.tuned, [bool(v.refused) for v in now], "higher"),
            *judged_share("neither_rate", probe.tuned, neither, "lower")[:1],
        ]
