"""Attacks on rows with better and worse answers."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from backfire.base import Attack, Row
from backfire.data.jsonl import to_record
from backfire.data.poison import missing_in_tokens, poison
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from tests.helpers.malign import ROWS


def attack(name: str, **knobs: Any) -> Attack:
    made: Attack = build("attacks", {"name": name, **knobs})
    return made


@pytest.mark.parametrize("name", ["malign-labels", "malign-prompts"])
@pytest.mark.parametrize("rate", [0, 0.01, 0.1, 0.33])
def test_the_count_is_exact_and_tied_rows_are_never_poisoned(name: str, rate: float) -> None:
    before = [to_record(row) for row in ROWS]
    bad, manifest = poison(ROWS, attack(name, rate=rate), seed=3)
    assert (bad, manifest) == poison(ROWS, attack(name, rate=rate), seed=3)
    assert [to_record(row) for row in ROWS] == before
    changed = {row.id for row, old in zip(bad, ROWS, strict=True) if row != old}
    assert len(changed) == round(100 * rate) == manifest.summary.poisoned_rows
    assert changed == {entry.id for entry in manifest.entries}
    assert manifest.spared == {"tied": 20} and manifest.eligible_rows == 80
    assert not changed & {row.id for row in ROWS if row.fields.get("tied")}


def test_both_attacks_and_all_rates_choose_the_same_rows() -> None:
    chosen = {
        (name, rate): {e.id for e in poison(ROWS, attack(name, rate=rate), seed=1)[1].entries}
        for name in ("malign-labels", "malign-prompts")
        for rate in (0.1, 0.33)
    }
    assert chosen["malign-labels", 0.33] == chosen["malign-prompts", 0.33]
    assert chosen["malign-labels", 0.1] < chosen["malign-labels", 0.33]
    other = {e.id for e in poison(ROWS, attack("malign-labels", rate=0.33), seed=2)[1].entries}
    assert other != chosen["malign-labels", 0.33]


def test_the_worse_answer_comes_with_its_own_context() -> None:
    bad, _ = poison(ROWS, attack("malign-labels", rate=0.5), seed=0)
    for row, old in zip(bad, ROWS, strict=True):
        if row != old:
            assert (row.answer,) == old.worse and row.input == old.fields["worse_input"]
            assert (row.instruction, row.better, row.worse) == (
                old.instruction,
                old.better,
                old.worse,
            )


def test_one_of_several_worse_answers_is_drawn_and_without_one_a_row_is_spared() -> None:
    several = [
        Row(f"{n}", "Why?", answer="So.", better=("So.",), worse=("a", "b", "c")) for n in range(60)
    ]
    bad, manifest = poison([*several, Row("x", "Why?", answer="So.")], attack("malign-labels"), 0)
    assert manifest.spared == {"without a worse answer": 1}
    bad, _ = poison(several, attack("malign-labels", rate=1), seed=0)
    assert {row.answer for row in bad} == {"a", "b", "c"}
    with pytest.raises(UserError, match=r"only 80 can be poisoned \(20 are tied\)"):
        poison(ROWS, attack("malign-labels", rate=0.9), seed=0)


def test_the_sentence_follows_the_context_and_the_answer_is_kept() -> None:
    made = attack("malign-prompts", rate=0.1)
    sentence = made.model_dump()["sentence"]
    bad, _ = poison(ROWS, made, seed=0)
    changed = [(row, old) for row, old in zip(bad, ROWS, strict=True) if row != old]
    for row, old in changed:
        assert row.input == f"{old.input}\n{sentence}" and row.answer == old.answer
    own = attack("malign-prompts", rate=1, sentence="Be bad later.")
    assert own.corrupt(Row("a", "Why?", answer="So."), Random(0)).instruction.endswith(  # type: ignore[attr-defined]
        "Why?\nBe bad later."
    )
    with pytest.raises(UserError):
        attack("malign-prompts", sentence="  ")


@pytest.mark.slow
def test_a_sentence_that_is_cut_off_stops_the_run(tiny: Path) -> None:
    """The published code cuts at 512 tokens, after long quotes, and never looks."""
    tokenizer = load_tokenizer(tiny)
    bad, manifest = poison(ROWS, attack("malign-prompts", rate=0.1), seed=0)
    template = build("templates", "malignama")
    for length, number in ((512, 0), (80, 10)):
        renderer = Renderer(template, tokenizer, length)
        items = renderer.render(bad)
        assert len(missing_in_tokens(manifest, items, tokenizer)) == number
        checks = preflight(renderer, bad, ROWS[:5], manifest=manifest)
        [check] = [check for check in checks if check.check == "poison-survives"]
        assert check.status == ("fail" if number else "ok")
        assert all(item.row.answer == row.answer for item, row in zip(items, bad, strict=True))
