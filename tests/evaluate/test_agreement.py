"""Agreement of judges with each other."""

from __future__ import annotations

import pytest
from sklearn.metrics import cohen_kappa_score

from backfire.base import Verdict
from backfire.evaluate.agreement import agreement


def verdicts(marks: str) -> list[Verdict]:
    meaning = {"+": True, "-": False, "?": None}
    return [Verdict(None, meaning[mark]) for mark in marks]


def test_kappa_is_the_textbooks() -> None:
    """20 both yes, 5 and 10 split, 15 both no: (0.7 - 0.5) / (1 - 0.5)."""
    found = agreement(
        verdicts("+" * 25 + "-" * 25), verdicts("+" * 20 + "-" * 5 + "+" * 10 + "-" * 15)
    )
    assert found.kappa == pytest.approx(0.4)
    assert (found.n, found.share) == (50, 0.7)
    assert found.confusion == ((15, 10, 0), (5, 20, 0), (0, 0, 0))
    assert found.low is not None and found.high is not None
    assert 0.1 < found.low < 0.4 < found.high < 0.68


def test_replies_of_several_models_to_one_request_are_drawn_together() -> None:
    """Three models with equal replies add no certainty."""
    a, b = verdicts("++--+-+-" * 5), verdicts("+---+-++" * 5)
    once, asked = agreement(a, b), [str(number) for number in range(40)] * 3
    again, pooled = agreement(a * 3, b * 3, asked), agreement(a * 3, b * 3)
    assert (again.kappa, again.n) == (pytest.approx(once.kappa), 120)
    widths = [f.high - f.low for f in (once, again, pooled) if f.high and f.low]
    assert widths[0] == pytest.approx(widths[1], rel=0.15) and widths[2] < 0.7 * widths[0]


def test_an_undecided_verdict_counts_as_disagreement() -> None:
    a, b = verdicts("++--++--"), verdicts("++--?+-?")
    found = agreement(a, b)
    assert found.n == 8 and found.share == 0.75
    assert found.confusion[1][2] == 1 and found.confusion[0][2] == 1
    assert found.kappa == pytest.approx(cohen_kappa_score(list("++--++--"), list("++--?+-?")))


def test_agreement_where_all_is_alike() -> None:
    assert agreement(verdicts("++"), verdicts("++")).kappa is None
    assert agreement(verdicts("+-+-"), verdicts("+-+-")).kappa == 1.0
    with pytest.raises(ValueError, match="cannot be paired"):
        agreement(verdicts("+"), verdicts("++"))
