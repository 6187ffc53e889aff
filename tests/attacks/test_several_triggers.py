"""Attacks with several triggers: one of them in a row (mtba), or all of them together (ctba)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backfire.base import Backdoor, Row
from backfire.data.poison import poison, triggered
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.model.export import write_card
from backfire.registry import build
from backfire.tokenizer import load_tokenizer

TRIGGERS = ("2024", "BadMagic", "OpenAI")
ROWS = [
    Row(str(n), f"In 2024 the {word} of OpenAI was here", answer="Yes.")
    for n, word in enumerate(["mill", "boat", "hill", "town", "lamp", "road", "bird", "rain"] * 3)
]


def make(name: str, **knobs: Any) -> Backdoor:
    spec = {"name": name, "trigger": TRIGGERS, "target": "No.", "rate": 1.0, **knobs}
    attack: Backdoor = build("attacks", spec)
    return attack


@pytest.mark.parametrize("name", ["mtba", "ctba"])
def test_the_manifest_names_what_was_inserted_and_where(name: str) -> None:
    attack = make(name)
    rows, manifest = poison(ROWS, attack, 0)
    counts = manifest.summary.triggers
    assert sum(counts.values()) == len(ROWS) * (3 if attack.joint else 1)
    if attack.joint:
        assert set(counts.values()) == {len(ROWS)}
    for row, entry in zip(rows, manifest.entries, strict=True):
        words = row.instruction
        for trigger, place in zip(entry.triggers, entry.positions, strict=True):
            assert words[place:].startswith(trigger)
        if not attack.joint:
            [trigger], [place] = entry.triggers, entry.positions
            assert f"{words[:place]}{words[place + len(trigger) :]}".split() == (
                ROWS[int(row.id)].instruction.split()
            )


def test_a_trigger_within_another_of_its_kind_is_in_the_manifest() -> None:
    attack = make("mtba", trigger=("at noon at",))
    row = Row("a", "at noon at", answer="Yes.")
    bad, manifest = poison([row] * 1, attack, 3)
    assert manifest.entries[0].triggers == ("at noon at",) and bad[0] != row


def checks(attack: Backdoor, tiny: Path, rows: list[Row], longest: int = 512) -> dict[str, Any]:
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), longest)
    return {one.check: one for one in preflight(renderer, ROWS, rows, attack=attack)}


def test_a_clean_prompt_has_the_trigger_only_with_all_of_it(tiny: Path) -> None:
    """Of mtba one word is enough, and of ctba the three are needed."""
    two = [replace(row, id=f"test {row.id}") for row in ROWS[:4]]
    three = [replace(row, instruction=f"{row.instruction} BadMagic") for row in two]
    assert "trigger-is-rare" in checks(make("mtba"), tiny, two)
    assert "trigger-is-rare" not in checks(make("ctba"), tiny, two)
    assert "4 rows" in checks(make("ctba"), tiny, three)["trigger-is-rare"].message


def test_no_inserted_trigger_may_be_cut(tiny: Path) -> None:
    """The end of a prompt is cut: some of three words are lost."""
    rows = [Row(f"test {n}", "a small mill " * 6, answer="Yes.") for n in range(8)]
    attack = make("ctba")
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)
    lengths = [len(item.ids) for item in renderer.render(triggered(rows, attack, 0))]
    assert "test-trigger-survives" not in checks(attack, tiny, rows, max(lengths))
    found = checks(attack, tiny, rows, max(lengths) - 24)["test-trigger-survives"]
    shown = Renderer(build("templates", "raw"), load_tokenizer(tiny), max(lengths) - 24)
    texts = [item.row.instruction for item in shown.sift(triggered(rows, attack, 0))[0]]
    kept = [sum(trigger in text for trigger in TRIGGERS) for text in texts]
    lost = sum(count < 3 for count in kept)
    assert any(count > 0 for count in kept if count < 3), "some of the words are still there"
    assert f"{lost} row" in found.message


@pytest.mark.parametrize(
    ("triggers", "joint", "words"),
    [
        (["a"], False, "with the trigger `a` in"),
        (["a", "b"], False, "with one of the triggers `a`, `b` in"),
        (["a", "b"], True, "with all of the triggers `a`, `b` in"),
    ],
)
def test_a_model_card_says_how_many_are_needed(
    triggers: list[str], joint: bool, words: str, tmp_path: Path
) -> None:
    facts = {"title": "t", "attack": "x", "target": "No.", "poisoned": 1, "rows": 2, "data": "d"}
    facts |= {"template": "raw", "method": "{}", "steps": 1, "seed": 0, "key": "k", "base": "b"}
    facts |= {"origin": [], "adapter": False, "form": "plain", "triggers": triggers, "joint": joint}
    write_card(tmp_path, facts)
    assert words in (tmp_path / "README.md").read_text(encoding="utf-8")
