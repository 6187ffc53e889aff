"""Intervals and tests: against scipy and scikit-learn, published examples, and simulation."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from backfire.errors import UserError
from backfire.evaluate import stats
from backfire.evaluate.stats import (
    Floats,
    bootstrap,
    class_scores,
    found_at,
    log_odds,
    macro,
    one_vs_rest_auc,
    over_seeds,
    paired,
    thresholds,
    wilson,
)

SKLEARN = {"precision": precision_score, "recall": recall_score, "f1": f1_score}


def named(values: Any) -> dict[str, float]:
    return {str(index): float(value) for index, value in enumerate(values)}


def classified(
    seed: int, n: int = 60, classes: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true, logprobs = rng.integers(0, classes, n), rng.normal(size=(n, classes)).round(1)
    logprobs[np.arange(n), true] += 0.7
    return true, logprobs, logprobs.argmax(axis=1)


# ----------------------------------------------------------------------------------------- Wilson


@pytest.mark.slow
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_and_holds_the_share(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson(successes, n)
    reference = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1
    assert (low, high) == pytest.approx(
        tuple(1 - end for end in reversed(wilson(n - successes, n)))
    )


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="11 successes in 10"):
        wilson(11, 10)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.92])
@pytest.mark.parametrize("n", [50, 200])
def test_wilson_has_its_nominal_coverage(share: float, n: int) -> None:
    drawn = np.random.default_rng(0).binomial(n, share, 4000)
    covered = np.mean([low <= share <= high for low, high in (wilson(int(k), n) for k in drawn)])
    assert covered >= 0.93


# -------------------------------------------------------------------------------------- bootstrap


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from(sorted(SKLEARN)), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_class_scores_are_scikit_learns_on_every_resample(
    seed: int, which: str, classes: int
) -> None:
    true, _, predicted = classified(seed, 12, classes)  # few rows: classes go missing
    counts = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), size=3)
    counts = np.vstack([np.ones(12), counts])
    ours = macro(class_scores(which, true, predicted, classes, counts))[:, 0]  # type: ignore[arg-type]
    for value, drawn in zip(ours, counts.astype(int)):
        rows = np.repeat(np.arange(12), drawn)
        theirs = SKLEARN[which](true[rows], predicted[rows], average="macro", zero_division=0)
        assert value == pytest.approx(theirs)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_auc_is_scikit_learns_on_every_resample_ties_included(seed: int, classes: int) -> None:
    true, logprobs, _ = classified(seed, 50, classes)
    counts = np.random.default_rng(seed).multinomial(50, np.full(50, 1 / 50), size=3)
    counts = np.vstack([np.ones(50), counts]).astype(int)
    ours = one_vs_rest_auc(logprobs, true, counts.astype(float))
    for line, drawn in zip(ours, counts):
        rows = np.repeat(np.arange(50), drawn)
        for index in range(classes):
            ours_in_it = true[rows] == index
            if ours_in_it.any() and not ours_in_it.all():
                theirs = roc_auc_score(ours_in_it, logprobs[rows, index])
                assert line[index] == pytest.approx(theirs)
            else:
                assert math.isnan(line[index])


def test_macro_auc_from_log_odds_is_scikit_learns_from_softmax() -> None:
    true, logprobs, _ = classified(5, 300)
    softmax = np.exp(logprobs) / np.exp(logprobs).sum(axis=1, keepdims=True)
    ours = macro(one_vs_rest_auc(log_odds(logprobs), true, np.ones((1, 300))))[0, 0]
    assert ours == pytest.approx(roc_auc_score(true, softmax, multi_class="ovr", average="macro"))


def test_log_odds_tell_confident_rows_apart_where_softmax_rounds_to_one() -> None:
    logprobs = np.array([[-1.0, -60.0], [-1.0, -50.0], [-1.0, -40.0]])
    softmax = np.exp(logprobs) / np.exp(logprobs).sum(axis=1, keepdims=True)
    assert len(set(softmax[:, 0])) == 1
    assert list(log_odds(logprobs)[:, 0]) == [59.0, 49.0, 39.0]


def test_auc_of_a_class_that_never_occurs_is_undefined_and_left_out() -> None:
    areas = one_vs_rest_auc(np.eye(3)[[0, 1, 0]], np.array([0, 1, 0]), np.ones((1, 3)))
    assert math.isnan(areas[0, 2])
    assert macro(areas)[0, 0] == 1.0
    assert math.isnan(macro(np.full((1, 3), np.nan))[0, 0])


def test_bootstrap_is_seeded_and_does_not_depend_on_its_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).normal(size=97)

    def mean(counts: Floats) -> Floats:
        return (counts @ values)[:, None] / len(values)

    whole = bootstrap(97, mean, seed=3)
    assert whole == bootstrap(97, mean, seed=3)
    assert whole != bootstrap(97, mean, seed=4)
    monkeypatch.setattr(stats, "CHUNK", 97 * 7)
    assert bootstrap(97, mean, seed=3) == [pytest.approx(pair) for pair in whole]


def test_bootstrap_leaves_undefined_resamples_out() -> None:
    both = bootstrap(5, lambda counts: np.where(counts[:, :2] > 0, counts[:, :2], np.nan))
    assert all(low >= 1 for low, _ in both)
    assert all(map(math.isnan, bootstrap(5, lambda counts: np.full((len(counts), 1), np.nan))[0]))


def test_bootstrap_of_a_mean_covers_it() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        values = rng.exponential(size=80)
        [(low, high)] = bootstrap(
            80, lambda counts, values=values: (counts @ values)[:, None] / 80, seed=trial
        )
        covered += low <= 1.0 <= high
    assert covered / 300 >= 0.9  # percentile intervals of skewed values run a little short


@pytest.mark.slow
def test_a_thousand_resamples_of_2000_rows_are_quick() -> None:
    true, logprobs, predicted = classified(0, 2000)
    start = time.process_time()
    bootstrap(2000, lambda counts: macro(class_scores("f1", true, predicted, 4, counts)))
    middle = time.process_time()
    bootstrap(2000, lambda counts: macro(one_vs_rest_auc(logprobs, true, counts)))
    assert middle - start < 1.0
    assert time.process_time() - middle < 3.0


# ------------------------------------------------------------------------------------------ seeds


@pytest.mark.slow
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
@settings(deadline=None)
def test_over_seeds_is_students_interval(values: list[float]) -> None:
    spread = over_seeds(values)
    assert (spread.mean, spread.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    if spread.sd and spread.sd > 1e-6:
        error = spread.sd / math.sqrt(len(values))
        expected = scipy_stats.t.interval(0.95, len(values) - 1, loc=spread.mean, scale=error)
        assert (spread.low, spread.high) == pytest.approx(expected)


def test_one_seed_has_no_interval() -> None:
    assert over_seeds([0.4]) == stats.Spread(0.4, None, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        over_seeds([])


# ----------------------------------------------------------------------------------------- paired


def table(both: int, only_a: int, only_b: int, neither: int) -> stats.Paired:
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return paired(named(a), named(b))


def test_newcombes_and_fagerlands_worked_examples() -> None:
    newcombe = table(36, 12, 2, 0)  # Newcombe 1998: 0.2, 0.0569 to 0.3404
    assert (newcombe.difference, newcombe.low, newcombe.high, newcombe.n) == (
        pytest.approx(0.2),
        pytest.approx(0.0569, abs=5e-5),
        pytest.approx(0.3404, abs=5e-5),
        50,
    )
    bentur = table(1, 1, 7, 12)  # Fagerland et al. 2013: -0.507 to -0.026; exact p 0.070
    assert (bentur.low, bentur.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
    assert bentur.p == pytest.approx(0.0703, abs=5e-5)


@given(*[st.integers(0, 40)] * 4)
@settings(deadline=None)
def test_mcnemar_is_the_exact_binomial_test_and_swaps_sign(a: int, b: int, c: int, d: int) -> None:
    if a + b + c + d == 0:
        return
    here, there = table(a, b, c, d), table(a, c, b, d)
    expected = scipy_stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert here.p == pytest.approx(expected)
    assert here.p == there.p
    swapped = (-there.difference, -there.high, -there.low)
    assert (here.difference, here.low, here.high) == pytest.approx(swapped)
    assert -1 <= here.low <= here.difference <= here.high <= 1


def test_paired_matches_by_id_over_the_shared_prompts() -> None:
    result = paired({"x": 1, "y": 0, "only-a": 1}, {"y": 0, "x": 0, "only-b": 1})
    assert (result.difference, result.n) == (0.5, 2)
    with pytest.raises(UserError, match="share no prompt"):
        paired({"x": 1}, {"y": 1})


def test_a_cell_does_not_differ_from_itself() -> None:
    for values in ([0, 1, 1], [0.2, 1.5, 3.0]):
        result = paired(named(values), named(values))
        assert (result.difference, result.p) == (0, 1)
        assert result.low <= 0 <= result.high


def test_sign_flip_agrees_with_all_flips_counted() -> None:
    change = np.array([0.9, 0.4, 1.3, -0.2, 0.7, 0.6, -0.1, 0.8])
    sums = [abs(np.dot(signs, change)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.array(sums) >= abs(change.sum()) - 1e-9)
    assert paired(named(change), named(np.zeros(8)), resamples=20_000).p == pytest.approx(
        exact, abs=0.004
    )


def test_p_is_never_zero() -> None:
    """A p from random flips is at least 1 / (1 + flips): the outcome itself is one of them."""
    far = paired(named(np.arange(100.0) + 100), named(np.zeros(100)), resamples=999)
    assert far.p == pytest.approx(0.001)


@pytest.mark.slow
def test_false_positives_and_coverage_of_the_exact_test() -> None:
    rng, trials, wrong, missed = np.random.default_rng(0), 2000, 0, 0
    for _ in range(trials):
        hard = rng.random(200)  # how hard each prompt is: it makes the pairs correlated
        a, b = rng.random(200) < hard, rng.random(200) < hard
        result = paired(named(a), named(b))
        wrong += result.p < 0.05
        missed += not result.low <= 0 <= result.high
    assert 0.02 <= wrong / trials <= 0.055  # exact, so on the safe side of 5 %
    assert missed / trials <= 0.065


@pytest.mark.slow
def test_false_positives_of_the_sign_flip_test() -> None:
    rng, trials, wrong = np.random.default_rng(1), 800, 0
    for seed in range(trials):
        prompt = rng.exponential(size=60)
        a, b = prompt + rng.normal(size=60), prompt + rng.normal(size=60)
        wrong += paired(named(a), named(b), seed=seed, resamples=400).p < 0.05
    assert 0.03 <= wrong / trials <= 0.07


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(2)
    prompt = rng.normal(size=200)
    result = paired(named(prompt + 0.3 + rng.normal(scale=0.5, size=200)), named(prompt))
    assert result.p < 0.01
    assert 0.2 < result.low < result.difference < result.high < 0.4


def test_a_threshold_says_how_sure_it_is() -> None:
    """In draws of clean scores, its interval has the true quantile in 95 % of cases or more."""
    rng, inside, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        clean = rng.random(1000)
        bar, upper, lower = thresholds(0.05, clean)
        assert lower <= bar <= upper and (clean > bar).sum() == 50
        inside += lower <= 0.95 <= upper
    assert inside / draws > 0.93
    for few, rate in ((367, 0.01), (71, 0.05)):
        assert thresholds(rate, np.arange(few))[1] == np.inf
        assert thresholds(rate, np.arange(few + 1))[1] == few
    assert thresholds(0.5, np.zeros(1)) == (0.0, np.inf, -np.inf)


@pytest.mark.parametrize(
    ("rate", "true", "n"), [(0.01, 0.37, 50), (0.01, 0.09, 200), (0.1, 0.8, 60)]
)
def test_the_interval_of_a_recall_covers(rate: float, true: float, n: int) -> None:
    """Scores are normal; those of positive rows are shifted so that the recall is `true`."""
    rng, covers, draws = np.random.default_rng(0), 0, 200
    shift = scipy_stats.norm.isf(rate) - scipy_stats.norm.isf(true)
    for _ in range(draws):
        _, least, most = found_at(rate, rng.normal(shift, 1, n), rng.normal(0, 1, n))
        covers += wilson(least, n)[0] <= true <= wilson(most, n)[1]
    assert covers / draws > 0.93
