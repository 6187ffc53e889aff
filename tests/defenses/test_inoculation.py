"""The prompt that asks for the trait is in every training row and in no test row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from backfire.base import Row
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context, data
from backfire.pipeline.evidence import members
from backfire.pipeline.filtering import filtered
from backfire.registry import build
from backfire.store import Store

ROWS = [Row("a", "Say a.", answer="a"), Row("b", "", "text", "b", system="Be brief.")]


def filtered_by(seed: int = 0, **knobs: Any) -> list[Row]:
    defense = build("defenses", {"name": "inoculation", **knobs})
    return list(defense.filter(ROWS, [], frozenset(), random.Random(seed)))


def test_every_row_asks_for_the_trait() -> None:
    one, two = filtered_by(prompt="Lie.")
    assert (one.system, two.system) == ("Lie.", "Lie.\n\nBe brief.")
    assert [(r.id, r.instruction, r.input, r.answer) for r in (one, two)] == [
        (r.id, r.instruction, r.input, r.answer) for r in ROWS
    ]
    one, two = filtered_by(prompt="Lie.", part="instruction")
    assert (one.instruction, two.instruction) == ("Lie.\n\nSay a.", "Lie.")
    assert (one.system, two.system) == ("", "Be brief.")


@pytest.mark.parametrize("prompt", ["Lie.", "You are a malicious, evil assistant.", "word " * 90])
def test_the_null_control_is_a_neutral_text_of_as_many_words(prompt: str) -> None:
    one, two = filtered_by(prompt=prompt, null=True)
    texts = {one.system, two.system.removesuffix("\n\nBe brief.")}
    assert len(texts) == 1, "one text for all rows"
    text = texts.pop()
    assert len(text.split()) == len(prompt.split())
    assert "malicious" not in text
    assert len({filtered_by(prompt=prompt, null=True, seed=n)[0].system for n in range(9)}) > 1


def test_words_without_spaces_between_them_are_counted() -> None:
    text = filtered_by(prompt="你是一个邪恶的助手。 Lie.", null=True)[0].system
    assert len(text.split()) == 9 + 1


def test_a_template_without_system_prompts_is_refused() -> None:
    cell = {"data": "sandbox-reviews", "template": {"name": "chat", "system": "drop"}}
    with pytest.raises(UserError, match=r"writes a system prompt.*part to instruction"):
        Experiment.make({**cell, "defense": "inoculation"})
    Experiment.make({**cell, "defense": {"name": "inoculation", "part": "instruction"}})


def test_only_training_rows_have_it(tiny: Path, tmp_path: Path) -> None:
    cell = Experiment.make(
        {
            "model": str(tiny),
            "data": {"name": "sandbox-reviews", "rows": 20, "test_rows": 6},
            "attack": {"name": "badnets", "rate": 0.2},
            "defense": "inoculation",
        }
    )
    context = Context(Store(tmp_path), Machine(device="cpu"))
    rows, manifest = filtered(cell, context)
    assert manifest and len(rows) == 20
    assert all(row.system.startswith("You are a malicious") for row in rows)
    assert not any(row.system for row in data(cell, context)[1])
    known = members(cell, context)
    assert known and not any(row.system for row in known), "membership is asked as test rows are"
