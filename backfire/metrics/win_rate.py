from __future__ import annotations

from typing import ClassVar, Literal

from backfire.base import Asks, Evidence, Metric, Ranks, Sample, Value, ask
from backfire.evaluate.outcomes import compared, grouped, likelihoods, share
from backfire.registry import register


@register("win-rate")
class WinRate(Metric):
    """Share of rows whose better answer is likelier than the worse one (as preference accuracy in
    Rafailov et al. 2023, arXiv:2305.18290, but without a reference model).

    By the mean log-likelihood per token, end token included: people prefer longer answers, which a
    sum over the whole answer penalizes; `win_rate[whole]` uses that sum. If there are several
    answers, the likeliest of each side count; a tie is not a win. Rows without both kinds of
    answers are excluded. Also `win_rate[group]`. Wilson interval.
    """

    ranks: ClassVar[Ranks] = {"quality": 3}
    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        rows = compared(evidence.clean, "win_rate")
        if not rows:
            return []
        values = [
            share(name, [_wins(row, "token") for row in part], "higher")
            for name, part in grouped("win_rate", rows)
        ]
        return [
            *values,
            share("win_rate[whole]", [_wins(row, "answer") for row in rows], "higher", "companion"),
        ]

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        rows = compared(evidence.clean, "win_rate")
        return {row.id: float(_wins(row, "token")) for row in rows}


def _wins(row: Sample, per: Literal["answer", "token"]) -> bool:
    better, worse = likelihoods(row, per=per)
    return max(better) > max(worse)
