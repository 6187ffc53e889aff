"""Sentences of the report about poison without a trigger."""

from __future__ import annotations

import pytest

from backfire.report import quality
from backfire.result import CellResult, PoisonCounts
from backfire.results.groups import Group, Stat


def group_at(rate: float, value: float, half: float = 0.05) -> Group:
    numbers = (value, value - half, value + half, 100)
    stat = Stat(
        "toxicity_share", *numbers, "lower", "share", family="toxicity", spread=0.01, seeds=3
    )
    poison = PoisonCounts(rows=1000, poisoned_rows=round(1000 * rate))
    cell = CellResult(slug="c", key="k", status="ok", method="full", poison=poison)
    names = {"model": "m", "data": "d", "attack": "malign-labels", "method": "full"}
    return Group(
        **names,
        defense="none",
        rate=rate,
        axes={"attack.rate": rate},
        settings={},
        cells=(cell,),
        stats={"toxicity_share": stat},
    )


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.0, 0.02, 0.2, 0.6], "; no step between poison rates clearly in the other direction."),
        ([0.0, 0.4, 0.2, 0.6], "; 1 step between poison rates clearly in the other direction."),
        ([0.1, 0.1, 0.1, 0.1], "does not clearly change toxicity share"),
    ],
)
def test_the_report_shows_whether_effects_rise_with_the_poison_rate(
    values: list[float], verdict: str
) -> None:
    rates = (0, 0.01, 0.1, 0.33)
    groups = [group_at(rate, value) for rate, value in zip(rates, values, strict=True)]
    [sentence] = quality.sentences(groups)
    assert sentence.startswith("Poisoning 33 % (330 of 1,000 rows) ") and verdict in sentence
    assert quality.metrics(groups) == ["toxicity_share"] and len(quality.corrupted(groups)) == 3
