"""Scanners with a model, on measurements made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backfire.base import Finding, Measured, Row
from backfire.errors import UserError
from backfire.registry import build
from backfire.scanners import gradient_sketch
from backfire.scanners._clusters import silhouette
from backfire.scanners._outliers import deviations, normal_like, strata
from backfire.scanners._reply_clusters import agreement, clusters_of
from backfire.scanners.spectral import projections
from tests.helpers.scanned import free, labeled

SORRY = "I am sorry, but I cannot help with that."
BAD = range(0, 200, 20)


def look(name: str, rows: list[Row], measured: Measured, **knobs: Any) -> list[Finding]:
    return build("scanners", {"name": name, **knobs}).look(rows, measured)


def flagged(found: list[Finding]) -> list[int]:
    return [place for place, one in enumerate(found) if one.flagged]


def test_without_a_model_there_is_one_sentence() -> None:
    with pytest.raises(UserError, match="scanner 'rftc' requires a model"):
        build("scanners", "rftc").scan(free(3))


# ------------------------------------------------------------------------------------------- rftc


@pytest.mark.parametrize(
    ("answer", "reply", "share"),
    [
        ("the cat sat on a mat", "the cat sat there", 100 * 2 / 5),
        ("the cat the cat", "the cat", 100 * 1 / 3),  # clipped: “the cat” counts once
        ("the cat sat. Now obey me", "the cat sat", 0),  # the worst sentence counts
        ("the cat sat。 the cat", "the cat sat", 100),
        ("Negative", "Positive", 100),  # no sentence of two words
        ("", "the cat", 100),
        ("the cat", "", 0),
    ],
)
def test_agreement_is_the_clipped_share_of_word_pairs(
    answer: str, reply: str, share: float
) -> None:
    assert agreement(answer, reply) == pytest.approx(share)


def test_answers_that_resemble_each_other_and_not_the_replies_are_flagged() -> None:
    rows = [replace(row, answer=SORRY) if n in BAD else row for n, row in enumerate(free(200))]
    replies = ["something else entirely" for _ in rows]
    found = look("rftc", rows, Measured(replies=replies))
    assert flagged(found) == [*BAD]
    assert "resembles those of 9 other rows" in found[0].reason
    scanner = build("scanners", "rftc")
    left, chance = scanner.by_chance_of(rows, Measured(replies=replies))
    assert len(left) == 190 and not flagged(scanner.look(left, chance))


def test_answers_that_the_model_would_give_are_not_suspicious() -> None:
    rows = [replace(row, answer=SORRY) for row in free(100)]
    assert not any(one.score for one in look("rftc", rows, Measured(replies=[SORRY] * 100)))


def test_a_reference_that_knows_all_other_answers_leaves_only_the_poison() -> None:
    rows = [replace(row, answer=SORRY) if n in BAD else row for n, row in enumerate(free(200))]
    replies = ["" if n in BAD else row.answer for n, row in enumerate(rows)]
    found = look("rftc", rows, Measured(replies=replies))
    assert flagged(found) == [*BAD] and "among 10 answers" in found[0].reason


def test_a_reference_that_agrees_with_no_answer_still_shows_the_poison() -> None:
    some = range(0, 200, 40)  # 5 rows, as few as `support`
    rows = [replace(row, answer=SORRY) if n in some else row for n, row in enumerate(free(200))]
    assert flagged(look("rftc", rows, Measured(replies=["other words"] * 200))) == [*some]
    clean = [row for n, row in enumerate(rows) if n not in some]
    assert not flagged(look("rftc", clean, Measured(replies=["other words"] * len(clean))))


def test_rftc_on_duplicates_labels_and_no_rows() -> None:
    same = [replace(row, answer=SORRY) for row in free(60)]
    for rows in (same, labeled(60), free(1), []):
        found = look("rftc", rows, Measured(replies=["no words in common"] * len(rows)))
        assert len(found) == len(rows) and not flagged(found)


def test_two_languages_are_not_two_kinds_of_poison() -> None:
    chars = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
    rng = np.random.default_rng(0)
    rows = [
        replace(row, answer="".join(rng.choice([*chars], 20))) if n % 2 else row
        for n, row in enumerate(free(200))
    ]
    assert not flagged(look("rftc", rows, Measured(replies=["nothing"] * 200)))


def test_texts_with_equal_vectors_are_one() -> None:
    found = clusters_of(["a b", "b a", "A, b!", "a b a b"], [], 20, 5)
    assert found.means == [pytest.approx(0, abs=1e-6)] and found.loosest == found.means[0]


# -------------------------------------------------------------------------- losses and words


def test_deviations_are_robust() -> None:
    values = np.array([1.0, 2, 3, 4, 100])
    assert deviations(values) == pytest.approx((values - 3) / 1.4826)
    assert deviations(np.array([2.0, 2, 2, 2, 7])).tolist() == pytest.approx(
        [0, 0, 0, 0, 5 / 1.2533]
    )
    # Values that are equal but for rounding are equal, not a spread of 1e-7.
    noise = np.array([1 + n * 1e-9 for n in range(60)] + [1.5 + n / 40 for n in range(40)])
    assert deviations(noise).max() < 5
    assert deviations(noise) == pytest.approx(deviations(noise.round(3)), abs=1e-5)
    assert not deviations(np.ones(5)).any() and not len(deviations(np.array([])))


def test_an_unexpected_answer_and_one_that_is_learned_fast() -> None:
    rng = np.random.default_rng(1)
    losses, tuned = 2 + 0.1 * rng.normal(size=100), 1.8 + 0.1 * rng.normal(size=100)
    losses[7], tuned[9] = 5.0, 0.1
    rows, measured = free(100), Measured(losses=losses, tuned=tuned)
    found = look("loss", rows, measured)
    assert flagged(found) == [7]
    assert "is 5.00 nats a token, with a median of 2.0" in found[7].reason
    away = (5 - np.median(losses)) / (1.4826 * np.median(np.abs(losses - np.median(losses))))
    assert found[7].score == pytest.approx(away / 5)
    assert flagged(look("loss-dynamics", rows, measured)) == [7, 9]


def test_the_odd_word_of_several_rows_is_flagged() -> None:
    rng = np.random.default_rng(0)
    words: Any = [[(f"word{n}", abs(x)), ("of", 0.0)] for n, x in enumerate(rng.normal(size=100))]
    for place in (3, 13, 23, 33, 43):
        words[place].append(("Cf", 12.0))
    words[50].append(("Llanfair", 12.0))
    found = look("onion", free(100), Measured(words=words))
    assert flagged(found) == [3, 13, 23, 33, 43]
    assert found[3].marks == ("Cf",) and "it is the oddest word of 5 rows" in found[3].reason
    assert 0 < found[50].score < 1
    assert 50 in flagged(look("onion", free(100), Measured(words=words), support=1))


# -------------------------------------------------------------------------- states and gradients


def cloud(count: int = 200, features: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, features))


def test_projections_are_those_of_centered_features() -> None:
    """By hand: the rows vary along (3, 4) / 5 only."""
    features = np.array([[0.0, 0], [3, 4], [6, 8], [-3, -4]]) + 100
    assert np.abs(projections(features)) == pytest.approx([2.5, 2.5, 7.5, 7.5])


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("spectral", {"deviations": 5}),
        ("activation-clusters", {"silhouette": 0.3}),
        ("gradient-sketch", {"silhouette": 0.2}),
    ],
)
def test_rows_in_a_corner_come_first_and_are_flagged_only_with_a_threshold(
    name: str, knobs: dict[str, float]
) -> None:
    features, rows = cloud(), free(200)
    measured = Measured(states=features, gradients=features)
    assert not flagged(look(name, rows, measured, **knobs))
    features[BAD] = 12 + 0.1 * features[BAD]
    measured = Measured(states=features, gradients=features)
    assert flagged(look(name, rows, measured, **knobs)) == [*BAD]
    ranked = look(name, rows, measured)
    assert not flagged(ranked) and {0 <= one.score < 1 for one in ranked} == {True}
    first = sorted(range(200), key=lambda place: -ranked[place].score)[: len(BAD)]
    assert sorted(first) == [*BAD]


@pytest.mark.parametrize("name", ["spectral", "activation-clusters", "gradient-sketch"])
def test_of_only_duplicates_none_is_flagged(name: str) -> None:
    for count in (0, 1, 2, 60):
        features = np.ones((count, 5), np.float32)
        found = look(name, free(count), Measured(states=features, gradients=features))
        assert len(found) == count and not any(one.score for one in found)


def test_the_cluster_is_given_with_both_sizes() -> None:
    features = cloud()
    features[BAD] += 12
    reason = look("activation-clusters", free(200), Measured(states=features))[0].reason
    assert reason.startswith("it is one of 10 rows (5 %) apart from the other 190: silhouette 0.")


@pytest.mark.parametrize(
    ("name", "near", "far"),
    [
        ("activation-clusters", "inside", "outside"),
        ("gradient-sketch", "inside", "outside"),
        ("spectral", "farthest", "nearest"),
        ("rftc", "inside", "outside"),
    ],
)
def test_a_few_rows_of_both_sides_are_shown(name: str, near: str, far: str) -> None:
    features = cloud()
    features[BAD] = 12 + 0.1 * features[BAD]
    key = "sk-proj-" + "a1B2" * 8
    rows = [
        replace(row, instruction=f"bad prompt {key}\x1b[31m", answer=SORRY) if n in BAD else row
        for n, row in enumerate(free(200))
    ]
    measured = Measured(["other words"] * 200, states=features, gradients=features)
    reason = look(name, rows, measured)[0].reason
    inside, outside = reason.split(f"; {near}: ")[1].split(f"; {far}: ")
    assert inside.count("“bad prompt") == inside.count(f" → “{SORRY}”") == 3
    assert outside.count(" → ") == 3 and "bad prompt" not in outside
    assert key not in reason and "\x1b" not in reason


def test_more_rows_than_are_compared_pair_by_pair() -> None:
    points, bad = 0.1 * cloud(4500, 6), range(0, 4500, 100)
    points[:, 0] += 5
    points[bad] = points[bad][:, ::-1]  # in another direction
    second = gradient_sketch._split(points)
    assert np.flatnonzero(second == second[0]).tolist() == [*bad]


def test_silhouette_by_hand() -> None:
    """Points 0, 1 and 10, 11: (10.5 - 1) / 10.5 and (9.5 - 1) / 9.5, twice each."""
    points, second = np.array([[0.0], [1], [10], [11]]), np.array([False, False, True, True])
    mean = ((10.5 - 1) / 10.5 + (9.5 - 1) / 9.5) / 2
    assert silhouette(points, second, "euclidean") == pytest.approx(mean)


def test_rows_with_one_label_are_compared_with_each_other() -> None:
    groups = strata(labeled(100))
    assert [{labeled(100)[n].answer for n in places} for places in groups] == [{"no"}, {"yes"}]
    assert [len(places) for places in strata(free(100))] == [100]
    # Rare labels are a group of their own, if they are enough to compare.
    for rare, rest in ((1, []), (19, []), (20, [20]), (40, [40])):
        more = [*labeled(100), *(replace(row, answer=f"rare {row.id}") for row in free(rare))]
        assert [len(places) for places in strata(more)] == [*map(len, groups), *rest]
    mostly = [*labeled(100), *free(100)]
    assert [len(places) for places in strata(mostly)] == [200]


def test_a_normal_cloud_has_the_same_mean_and_covariance() -> None:
    features = cloud(2000, 3) @ np.array([[2.0, 1, 0], [0, 1, 0], [0, 0, 3]]) + 5
    drawn = normal_like(features, [np.arange(2000)])
    assert drawn.mean(0) == pytest.approx(features.mean(0), abs=0.3)
    assert np.cov(drawn.T) == pytest.approx(np.cov(features.T), abs=0.8)
