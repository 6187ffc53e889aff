"""Scanners that compare rows with each other or with a test set."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from backfire.base import Finding, Row
from backfire.registry import build
from tests.helpers.scanned import free, labeled


def scan(name: str, rows: list[Row], test: list[Row] | None = None, **knobs: Any) -> list[Finding]:
    return list(build("scanners", {"name": name, **knobs}).scan(rows, test or []))


def test_of_only_duplicates_all_but_the_first_are_flagged() -> None:
    rows = [replace(labeled(1)[0], id=f"d{n}") for n in range(500)]
    found = scan("near-duplicates", rows)
    assert [one.flagged for one in found] == [False, *[True] * 499]
    assert {one.reason for one in found[1:]} == {"it has the same words as row 1 (counted from 1)"}
    assert found[1].score > 1.2


def test_a_near_duplicate_is_found_and_other_rows_are_not() -> None:
    rows = free(1500)
    text = rows[100].instruction + " " + rows[100].answer
    near = replace(rows[100], answer=rows[100].answer.rsplit(" ", 2)[0])
    found = scan("near-duplicates", [*rows, near])
    assert [n for n, one in enumerate(found) if one.flagged] == [1500]
    assert (
        "it shares many word n-grams with row 101 (Jaccard similarity about 0.9"
        in found[1500].reason
        and len(text) > 50
    )


def test_case_and_typography_make_no_difference() -> None:
    rows = [
        Row("a", "It’s “fine”,  really so", answer="OK"),
        Row("b", 'it\'s "FINE", really so', answer="ok"),
    ]
    assert scan("near-duplicates", rows)[1].flagged


@pytest.mark.parametrize(("size", "changed"), [(200, range(90, 91)), (900, range(400, 500))])
def test_a_poisoned_twin_is_not_called_the_same(size: int, changed: range) -> None:
    """One word in a text is in none of the least hashes at times, and the middle of a long text is
    not read at all."""
    draw = Random(0)
    clean = [[f"w{draw.randrange(1000)}" for _ in range(size)] for _ in range(60)]
    poisoned = [
        [*one[: changed[0]], *["evil"] * len(changed), *one[changed[-1] + 1 :]] for one in clean
    ]
    rows = [
        Row("", " ".join(words), answer="yes")
        for pair in zip(clean, poisoned, strict=True)
        for words in (*pair, pair[0])
    ]
    found = scan("near-duplicates", rows)
    assert all(one.flagged for n, one in enumerate(found) if n % 3)
    assert all("same words" in one.reason and one.score > 1.4 for one in found[2::3])
    twins = found[1::3]
    assert not any("same" in one.reason or one.score > 1.25 for one in twins)
    assert any(
        "shares nearly all of the word n-grams that were sampled" in one.reason for one in twins
    )
    assert all(("in its first and last 200 words" in one.reason) == (size > 400) for one in twins)


def test_one_instruction_for_all_rows_makes_none_alike() -> None:
    long = "Read the following text with care and decide whether it is good or bad, in one word."
    rows = [
        replace(row, instruction=long, input=f"word{n} other{n}")
        for n, row in enumerate(labeled(40))
    ]
    assert not any(one.flagged for one in scan("near-duplicates", rows))


def test_a_long_common_beginning_makes_no_rows_alike() -> None:
    """As with examples that stand before each question."""
    examples = " ".join(f"example{n}" for n in range(600))
    rows = [
        Row(f"{n}", "Answer.", input=f"{examples} {' '.join(f'w{n}x{i}' for i in range(300))}")
        for n in range(20)
    ]
    assert not any(one.flagged for one in scan("near-duplicates", rows))
    again = replace(rows[3], id="again", answer="yes")
    assert scan("near-duplicates", [*rows, again])[-1].flagged


def test_a_prompt_of_the_test_set_is_found() -> None:
    train, test = free(300), free(50, seed=9)
    train[7] = replace(test[3], id="x", answer="another answer")
    found = scan("overlap", train, test)
    assert [n for n, one in enumerate(found) if one.flagged] == [7]
    assert found[7].reason == "its prompt has the same words as that of test row 4 (counted from 1)"
    assert not any(one.score for one in scan("overlap", train))


def test_an_instruction_that_begins_one_of_the_sets_is_compared_all_the_same() -> None:
    test = [Row(f"t{n}", f"Do task number {n} with the words below.", f"a{n} b{n}") for n in (3, 4)]
    others = [Row(f"r{n}", f"Do task number {n} with the words below.", f"x{n}") for n in (4, 5)]
    found = scan("overlap", [*others, replace(test[0], id="x"), replace(test[1], id="y")], test)
    assert [one.flagged for one in found] == [False, False, True, True]


def test_a_recurring_answer_stands_out_among_different_ones() -> None:
    rows = [
        replace(row, answer="No comment.") if n % 20 == 0 else row
        for n, row in enumerate(free(400))
    ]
    found = scan("repetition", rows)
    assert [n for n, one in enumerate(found) if one.flagged] == [*range(0, 400, 20)]
    assert found[0].reason == "the answer “No comment.” is in 20 of 400 rows"
    assert not any(one.score for one in scan("repetition", labeled(400)))


def test_one_prompt_with_two_labels() -> None:
    rows = labeled(400)
    rows[50] = replace(
        rows[10],
        id="x",
        input=rows[10].input.upper(),
        answer={"yes": "no", "no": "yes"}[rows[10].answer],
    )
    found = scan("labels", rows)
    assert [n for n, one in enumerate(found) if one.flagged] == [10, 50]
    assert "row 51 (counted from 1) has the same prompt and another answer" in found[10].reason
    several = scan("labels", [*free(50), *[replace(row, answer="other") for row in free(50)]])
    assert {one.score for one in several} == {0.5}


def test_a_label_against_the_words_is_ranked_first_and_not_flagged() -> None:
    words = {"yes": "bright lovely warm kind", "no": "dark dreadful cold cruel"}
    rows = [replace(row, input=f"{row.input} {words[row.answer]}") for row in labeled(600)]
    wrong = {"yes": "no", "no": "yes"}[rows[77].answer]
    rows[77] = replace(rows[77], answer=wrong)
    found = scan("labels", rows)
    assert max(range(600), key=lambda n: found[n].score) == 77
    assert 0.9 < found[77].score < 1 and f"not for “{wrong}”" in found[77].reason
    assert sum(one.score > 0 for one in found) < 5


def test_no_label_speaks_against_itself() -> None:
    """Of four labels, the likeliest may have less than half of the probability."""
    rng, labels = Random(0), ["red", "green", "blue", "gray"]
    texts = [f"{rng.choice('abcdefg')} {rng.choice('abcdefg')} u{n}" for n in range(400)]
    rows = [Row(text, text, answer=rng.choice(labels)) for text in texts]
    reasons = [one.reason for one in scan("labels", rows) if "speak for" in one.reason]
    pairs = [re.search(r"for “(\w+)”, not for “(\w+)”", reason) for reason in reasons]
    assert len(pairs) > 100 and all(pair and pair[1] != pair[2] for pair in pairs)
