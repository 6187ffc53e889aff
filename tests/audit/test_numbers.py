"""Intervals of few rows, and what counts as a finding."""

from __future__ import annotations

import math

import pytest

from backfire.audit.numbers import FEWEST, compared
from backfire.audit.output import _cleaned, _plain


def losses(*values: float) -> dict[str, float]:
    return {f"r{n}": value for n, value in enumerate(values)}


def test_one_row_has_no_interval_and_is_no_finding() -> None:
    one = compared("loss", losses(2.0), losses(2.2), unit="nats", bad="up")
    assert one.change.value == pytest.approx(0.2) and math.isnan(one.change.low)
    assert not one.is_worse
    assert one.cells[1:] == ["2", "2.2", "+0.200", "1"]
    assert _cleaned(_plain(one))["change"][1:] == [None, None]


def test_few_rows_have_the_interval_of_student() -> None:
    one = compared("loss", losses(0, 0, 0, 0), losses(1, 2, 3, 4), unit="nats", bad="up")
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (one.change.value, one.n) == (2.5, 4)
    assert one.change.low == pytest.approx(2.5 - half, rel=1e-6)
    assert one.change.high == pytest.approx(2.5 + half, rel=1e-6)
    assert one.is_worse and one.tuned.low == one.change.low
    apart = compared("loss", losses(0, 0), losses(0.1, 0.3), unit="nats", bad="up")
    assert apart.change.low < 0 and not apart.is_worse


def test_more_rows_have_the_interval_of_the_bootstrap() -> None:
    tuned = losses(*(n / 10 for n in range(FEWEST)))
    one = compared("loss", losses(*[0.0] * FEWEST), tuned, unit="nats", bad="up")
    assert 0.6 < one.change.low < 0.8 and 1.1 < one.change.high < 1.3
    assert one.change.low + one.change.high != 2 * one.change.value


def test_shares_have_an_interval_for_any_number_of_rows() -> None:
    one = compared("accuracy", losses(1), losses(0), bad="down")
    assert one.change.low < -0.5 and one.change.high >= 0 and not one.is_worse
