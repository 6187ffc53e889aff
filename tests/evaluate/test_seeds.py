"""Intervals and tests over several seeds have their nominal coverage, by simulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.special import expit, stdtrit

from backfire.evaluate.seeds import Crossed, crossed, difference_pads, holm, ratio
from backfire.result import CellResult, Value
from backfire.results.groups import Gap, Group, difference, group
from backfire.results.intervals import stat

pytestmark = pytest.mark.slow

ROWS, TRIALS = 120, 250
EASE, SPREAD = 1.0, 1.0
"""Mean and standard deviation of the rows' logits."""
SPREADS = (0.0, 0.2, 0.4, 0.8)
"""Standard deviations between seeds, in logits."""
NAMES = [f"test-{number}" for number in range(ROWS)]


def cells(outcomes: Any, method: str) -> list[CellResult]:
    """Finished cells whose rows are known: outcomes is [seeds, rows]."""
    return [
        CellResult(
            **{"slug": f"{method}-s{seed}", "key": "0", "status": "ok", "model": "m", "data": "d"},
            **{"attack": "none", "rate": 0.0, "method": method, "defense": "none", "seed": seed},
            values=(Value("accuracy", float(np.mean(row)), 0.0, 1.0, len(row), "higher", "share"),),
            outcomes={"accuracy": {id: (0, hit) for id, hit in zip(NAMES, row, strict=True)}},
        )
        for seed, row in enumerate(outcomes.tolist())
    ]


def tuned(seed: int, *values: Value, **known: Any) -> CellResult:
    return CellResult(
        slug="x", key="0", status="ok", method="full", seed=seed, values=values, **known
    )


def runs(seeds: int, spread: float, shift: float = 0.0) -> Iterator[tuple[Any, Any, Any]]:
    """Two methods on the same rows, trained anew under each seed: the outcomes of both, and the
    share that the first model would get right of all rows there are."""
    rng = np.random.default_rng([seeds, int(10 * spread), int(10 * shift)])
    for _ in range(TRIALS):
        rows = EASE + rng.normal(0, SPREAD, ROWS)
        effects = rng.normal(0, spread, (2, seeds, 1)) + np.array([0, shift])[:, None, None]
        a, b = (rng.random((2, seeds, ROWS)) < expit(rows + effects)).astype(float)
        yield a, b, effects[0, 0, 0]


@cache
def share(spread: float, shift: float = 0.0) -> float:
    """Mean outcome over all rows and seeds."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    logits = EASE + shift + math.hypot(SPREAD, spread) * x
    return float((weights * expit(logits)).sum() / weights.sum())


@cache
def gaps(seeds: int, spread: float, shift: float = 0.0) -> list[Gap]:
    found = []
    for a, b, _ in runs(seeds, spread, shift):
        gap = difference(*groups(a, b), "accuracy")
        assert gap is not None
        found.append(gap)
    return found


def groups(a: Any, b: Any) -> tuple[Group, Group]:
    first, second = group([*cells(a, "full"), *cells(b, "lora")])
    return first, second


def covered(found: list[Gap], truth: float) -> list[bool]:
    return [g.low is not None and g.high is not None and g.low <= truth <= g.high for g in found]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_differences_of_methods_are_covered(spread: float, shift: float) -> None:
    truth = share(spread, shift) - share(spread)
    hits = {seeds: covered(gaps(seeds, spread, shift), truth) for seeds in (2, 3, 4, 5)}
    assert 0.93 <= np.mean(list(hits.values())) <= 0.975
    assert all(0.915 <= np.mean(each) <= 0.99 for each in hits.values())


@pytest.mark.parametrize("spread", SPREADS)
def test_equal_methods_are_seldom_called_different(spread: float) -> None:
    wrong = []
    for seeds in (2, 3, 4, 5):
        found = gaps(seeds, spread)
        wrong.append([gap.p is not None and gap.p < 0.05 for gap in found])
        assert wrong[-1] == [gap.is_clear for gap in found]
    assert np.mean(wrong) <= 0.07 and all(np.mean(each) <= 0.085 for each in wrong)


@pytest.mark.parametrize("spread", SPREADS)
def test_means_over_seeds_are_covered(spread: float) -> None:
    hits = []
    for seeds in (2, 3, 4, 5):
        for a, _, _ in runs(seeds, spread):
            found = group(cells(a, "full"))[0].stats["accuracy"]
            assert found.low is not None and found.high is not None
            hits.append(found.low <= share(spread) <= found.high)
    assert 0.93 <= np.mean(hits) <= 0.975


def test_one_seed_speaks_of_its_own_model_only() -> None:
    own = []
    for a, b, _ in runs(1, 0.8):
        gap = difference(*groups(a, b), "accuracy")
        assert gap is not None and gap.p is None and gap.scope == "model"
        assert not gap.covers_seeds and not gap.is_clear
    for a, b, _ in runs(1, 0.0):  # where seeds do not differ, one model is like another
        gap = difference(*groups(a, b), "accuracy")
        assert gap is not None
        own += covered([gap], 0.0)
    assert 0.93 <= np.mean(own) <= 0.975


def test_pooling_seeds_and_satterthwaite_would_cover_less() -> None:
    """What the report's way is for: of both others the coverage falls short."""
    pooled, usual, ours = [], [], []
    for a, b, _ in runs(2, 0.8):
        table = b - a
        error = table.std() / math.sqrt(table.size)
        pooled.append(abs(table.mean()) <= 1.96 * error)
        found = crossed(a)
        usual.append(abs(found.value - share(0.8)) <= satterthwaite(a, found))
        low, high = found.interval()
        ours.append(low <= share(0.8) <= high)
    assert np.mean(pooled) < 0.5
    assert np.mean(usual) < 0.93 <= np.mean(ours)


def satterthwaite(table: Any, found: Crossed) -> float:
    """Half of the usual interval."""
    k, n = table.shape
    rest = table - table.mean(1)[:, None] - table.mean(0) + table.mean()
    chance = (rest**2).sum() / ((n - 1) * (k - 1)) / (n * k)
    by_row = ((table.mean(0) - table.mean()) ** 2).sum() / (n * (n - 1))
    variance = found.seed_variance + found.row_variance
    squares = found.seed_variance**2 / (k - 1) + by_row**2 / (n - 1)
    df = max(1.0, variance**2 / (squares + chance**2 / ((n - 1) * (k - 1))))
    return float(stdtrit(df, 0.975) * math.sqrt(variance))


@pytest.mark.parametrize("excess", [0.6, 0.3])
def test_the_share_of_a_difference_is_covered(excess: float) -> None:
    """A ratio of two differences from the same models, as of the harm that a defense removes."""
    rng, hits = np.random.default_rng(int(10 * excess)), []
    for _ in range(TRIALS):
        rows = rng.normal(0, 0.1, (2, 1, ROWS))
        noise = rng.normal(0, 0.03, (2, 3, 1)) + rng.normal(0, 0.2, (2, 3, ROWS))
        bottom = excess + rows[0] + noise[0]
        top = 0.5 * excess + rows[1] + noise[1]

        def less(r: float, top: Any = top, bottom: Any = bottom) -> Crossed:
            return crossed(top - r * bottom)

        low, high = ratio(less, top.mean() / bottom.mean())
        hits.append(low <= 0.5 <= high)
    assert 0.93 <= np.mean(hits) <= 0.98


def test_one_column_is_students_t() -> None:
    values = [0.4, 0.7, 0.5, 0.9]
    found = crossed(np.array(values)[:, None])
    expected = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
    assert found.interval() == pytest.approx(expected)
    assert found.p == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue)
    assert crossed(np.array([[0.4]])).p is None


def test_one_seed_is_students_t_over_rows() -> None:
    values = np.array([[0.4, 0.7, 0.5, 0.9]])
    expected = scipy_stats.t.interval(0.95, 3, values.mean(), scipy_stats.sem(values[0]))
    assert crossed(values).interval() == pytest.approx(expected)


def test_outcomes_that_never_differ_leave_room() -> None:
    """Nothing of 200 rows is no proof that there is nothing."""
    low, high = crossed(np.zeros((3, 200)), pads=(0, 0, 1, 1)).interval()
    assert low < 0 and 0.01 < high < 0.03
    low, high = crossed(np.zeros((3, 200)), pads=difference_pads(3)).interval()
    assert -0.01 < low < 0 < high < 0.01


def test_p_is_where_the_interval_begins_to_hold_zero() -> None:
    rng = np.random.default_rng(3)
    found = crossed(0.2 + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 1, (3, 80)))
    assert found.p is not None and 0.001 < found.p < 1
    ends = found.interval(1 - found.p)
    assert min(map(abs, ends)) == pytest.approx(0, abs=1e-6)
    assert crossed(np.zeros((3, 5))).p == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_a_change_of_few_rows_keeps_its_middle() -> None:
    """Changes that happen to be 0 and 1 are no shares: -1 was possible."""
    table = np.zeros((3, 40))
    table[:, 0] = 1
    head = Value("attack_success_excess", 1 / 40, 0.0, 0.1, 40, "lower", "share", "excess")
    hits = [{str(i): (0, hit) for i, hit in enumerate(row)} for row in table.tolist()]
    found = stat(
        [(tuned(seed, head, outcomes={head.metric: row}), head) for seed, row in enumerate(hits)]
    )
    assert found.low is not None and found.high is not None and found.low < 0
    assert (found.low + found.high) / 2 == pytest.approx(1 / 40, abs=0.003)


def test_a_metric_without_rows_is_never_surer_than_one_model() -> None:
    def known(*values: float) -> list[tuple[CellResult, Value]]:
        return [
            (tuned(seed), Value("f1", one, one - 0.1, one + 0.1, 50, "higher", "share"))
            for seed, one in enumerate(values)
        ]

    alike = stat(known(0.5, 0.5, 0.5))
    assert (alike.low, alike.high) == pytest.approx((0.4, 0.6))
    apart = stat(known(0.3, 0.5, 0.7))
    assert (apart.low, apart.high) == pytest.approx(
        scipy_stats.t.interval(0.95, 2, 0.5, scipy_stats.sem([0.3, 0.5, 0.7]))
    )


def without_rows(
    method: str, metric: str, values: list[float], half: float | None
) -> list[CellResult]:
    """Cells of which only the numbers are known."""
    found = []
    for cell, one in zip(cells(np.zeros((len(values), ROWS)), method), values, strict=True):
        ends = (None, None) if half is None else (one - half, one + half)
        value = Value(metric, one, *ends, 50, "higher", "share")
        found.append(replace(cell, values=(value,), outcomes={metric: {}}))
    return found


def test_seeds_that_agree_by_accident_prove_no_difference() -> None:
    """The F1 of two models that always say one label is the same under every seed."""
    alike = [
        *without_rows("full", "f1", [0.2] * 2, 0.1),
        *without_rows("lora", "f1", [0.22] * 2, 0.1),
    ]
    gap = difference(*group(alike), "f1")
    assert gap is not None and gap.p is None and not gap.is_clear
    assert gap.low is not None and gap.low < -0.1
    apart = [
        *without_rows("full", "f1", [0.2] * 2, 0.1),
        *without_rows("lora", "f1", [0.8] * 2, 0.1),
    ]
    gap = difference(*group(apart), "f1")
    assert gap is not None and gap.is_clear


def test_a_count_that_no_seed_changes_has_neither_interval_nor_p() -> None:
    first, second = group(
        [
            *without_rows("full", "trainable_share", [1.0] * 3, None),
            *without_rows("lora", "trainable_share", [0.068] * 3, None),
        ]
    )
    assert first.stats["trainable_share"].interval == ""
    gap = difference(first, second, "trainable_share")
    assert gap is not None and gap.low is None and gap.p is None


def test_equal_means_of_two_seeds_do_not_hide_the_rows_that_differ() -> None:
    """Three other rows of 80 change under each seed: by an exact test of six changes p is 0.03."""
    table = np.zeros((2, 80))
    table[0, :3] = table[1, 3:6] = 1.0
    change = crossed(table, pads=difference_pads(2))
    assert change.p is not None and change.p == pytest.approx(0.01, rel=0.01), "not 2e-5"
    assert change.interval()[0] > 0
