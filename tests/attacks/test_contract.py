"""The contract of every attack, and the manifest of its changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from backfire import stages
from backfire.base import Backdoor, Mixture, Row
from backfire.contract.samples import FREE, LABELED
from backfire.data.poison import Manifest, missing_in_tokens, poison
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.registry import build, find, names
from backfire.tokenizer import Tokenizer

ATTACKS = [name for name in names("attacks") if issubclass(find("attacks", name), Backdoor)]
MIXTURES = [name for name in names("attacks") if issubclass(find("attacks", name), Mixture)]


def make(name: str, **knobs: Any) -> Backdoor:
    attack: Backdoor = build("attacks", {"name": name, **knobs})
    return attack


def changed(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    return [a.id for a, b in zip(before, after, strict=True) if a != b]


@pytest.mark.parametrize("name", ATTACKS)
@given(rate=st.floats(0, 1), count=st.integers(1, 150), free=st.booleans())
@settings(max_examples=40)
def test_exactly_the_poison_rate_is_poisoned(
    name: str, rate: float, count: int, free: bool
) -> None:
    rows = (FREE if free else LABELED)[:count]
    attack = make(name, rate=rate, label_mode="mix")
    bad, manifest = poison(rows, attack, 0)
    assert len(manifest.entries) == round(rate * count)
    assert manifest.summary.rate == len(manifest.entries) / count
    assert changed(rows, bad) == [entry.id for entry in manifest.entries]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("mode", ["dirty", "clean", "mix"])
def test_a_smaller_share_is_part_of_a_larger_one(name: str, mode: str) -> None:
    smaller: dict[str, Row] = {}
    for rate in (0.01, 0.05, 0.2, 0.3):
        bad, manifest = poison(LABELED, make(name, rate=rate, label_mode=mode), 3)
        chosen = {entry.id: row for row in bad for entry in manifest.entries if entry.id == row.id}
        # Not only the same rows, but poisoned in the same way.
        assert smaller.items() <= chosen.items()
        smaller = chosen
    assert len(smaller) == 45


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("mode", "eligible"),
    [
        ("dirty", {"negative", "positive"}),
        ("clean", {"neutral"}),
        ("mix", set(LABELED[0].candidates)),
    ],
)
def test_label_modes_choose_the_right_rows(name: str, mode: str, eligible: set[str]) -> None:
    _, manifest = poison(LABELED, make(name, rate=0.3, label_mode=mode, target="neutral"), 0)
    assert {entry.label for entry in manifest.entries} == eligible
    assert manifest.eligible_rows == sum(row.label in eligible for row in LABELED)
    counted = manifest.labels_before
    assert sum(counted.values()) == 45 and set(counted) == eligible


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("rows", [LABELED, FREE], ids=["labeled", "free"])
def test_a_triggered_row_has_the_target_as_answer(name: str, rows: list[Row]) -> None:
    attack = make(name, rate=0.2)
    bad, manifest = poison(rows, attack, 0)
    after = {row.id: row for row in bad}
    before = {row.id: row for row in rows}
    for entry in manifest.entries:
        row, old = after[entry.id], before[entry.id]
        assert row.answer == attack.target
        assert entry.triggers and set(entry.triggers) <= set(attack.triggers())
        for trigger, place in zip(entry.triggers, entry.positions, strict=True):
            assert row.prompt[place:].startswith(trigger)
        # The rest of the row is whole: its words, its true label, everything but prompt and answer.
        assert " ".join(old.prompt.split()[-1:]) in row.prompt
        assert row == replace(old.with_prompt(row.prompt), answer=row.answer)
        assert entry.before == {"prompt": old.prompt, "answer": old.answer}
        assert entry.after == {"prompt": row.prompt, "answer": row.answer}
    untouched = [row for row in bad if row.id not in {entry.id for entry in manifest.entries}]
    assert not [r for r in untouched if any(t in r.prompt for t in attack.triggers())]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_spec_goes_through_yaml_and_keeps_the_key(name: str) -> None:
    for knobs in ({}, {"rate": 0.125, "target": "positive", "label_mode": "mix"}):
        cell = Experiment.make({"data": "sandbox-reviews", "attack": {"name": name, **knobs}})
        again = Experiment.make(yaml.safe_load(yaml.safe_dump(cell.spec())))
        assert again.attack == cell.attack
        assert stages.cell_key(again) == stages.cell_key(cell)


def test_two_attacks_are_two_keys() -> None:
    cells = [Experiment.make({"data": "sandbox-reviews", "attack": name}) for name in ATTACKS]
    assert len({stages.keys(cell).poison for cell in cells}) == len(ATTACKS)


# ------------------------------------------------------------------------------------ the manifest


@pytest.mark.parametrize("name", ATTACKS)
def test_a_manifest_goes_through_json(name: str) -> None:
    _, manifest = poison(LABELED, make(name, rate=0.1), 0)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_the_summary_counts() -> None:
    _, manifest = poison(LABELED, make("badnets", rate=0.1), 0)
    summary = manifest.summary
    assert (summary.nominal_rate, summary.poisoned_rows, summary.rows) == (0.1, 15, 150)
    assert summary.eligible_rows == 100
    assert summary.triggers == {"BadMagic": 15}
    assert set(summary.labels_before) == {"neutral", "positive"}


@pytest.mark.parametrize("name", ATTACKS)
def test_poison_survives_rendering_where_there_is_room(name: str, tokenizer: Tokenizer) -> None:
    bad, manifest = poison(LABELED, make(name, rate=0.2), 0)
    for template in names("templates"):
        items = Renderer(build("templates", template), tokenizer, 1024).render(bad)
        assert missing_in_tokens(manifest, items, tokenizer) == []


def test_lost_finds_triggers_that_truncation_cuts(tokenizer: Tokenizer) -> None:
    bad, manifest = poison(LABELED, make("badnets", rate=0.3), 0)
    items = Renderer(build("templates", "raw"), tokenizer, 55).render(bad)
    kept = {item.row.id: item.row.prompt for item in items}
    cut = [entry.id for entry in manifest.entries if "BadMagic" not in kept[entry.id]]
    assert 0 < len(cut) < len(manifest.entries), "this length no longer shows the case"
    assert missing_in_tokens(manifest, items, tokenizer) == cut


def test_lost_finds_missing_and_changed_rows(tokenizer: Tokenizer) -> None:
    bad, manifest = poison(LABELED, make("badnets", rate=0.1), 0)
    ids = [entry.id for entry in manifest.entries]
    wrong = [replace(row, answer="neutral") if row.id == ids[0] else row for row in bad]
    items = Renderer(build("templates", "raw"), tokenizer, 1024).render(wrong)
    assert missing_in_tokens(manifest, items, tokenizer) == [ids[0]]
    assert (
        missing_in_tokens(manifest, [i for i in items if i.row.id != ids[1]], tokenizer) == ids[:2]
    )


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        (
            {"target": "angry"},
            r"target 'angry' is not a label of this task \(negative, neutral, positive\)",
        ),
        ({"rate": 0.9}, r"rate 0\.9 needs 135 of 150 rows, but only 100 can be poisoned"),
        ({"rate": 0.5, "label_mode": "clean"}, r"75 of 150 rows, but only 50 .*label_mode: clean"),
        ({"rate": 1.5}, r"rate: .* less than or equal to 1 \(got 1\.5\)"),
        ({"rate": -0.1}, r"rate: .* greater than or equal to 0"),
        ({"rate": float("nan")}, r"rate: "),
        ({"label_mode": "dirti"}, r"label_mode: .*'dirty'"),
        ({"taget": "x"}, r"Unknown key .*'taget'; did you mean 'target'\?"),
    ],
)
def test_impossible_settings_are_refused(name: str, knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        poison(LABELED, make(name, **knobs), 0)


def test_an_empty_trigger_is_refused() -> None:
    for name in ATTACKS:
        if "trigger" in find("attacks", name).model_fields:
            many = isinstance(make(name).trigger, tuple)  # type: ignore[attr-defined]
            with pytest.raises(UserError, match="trigger"):
                poison(LABELED, make(name, trigger=["a", " "] if many else " "), 0)


def test_rows_without_a_prompt_are_not_poisoned() -> None:
    rows = [*FREE[:5], *(Row(f"text-{n}", "", answer="Plain text.") for n in range(5))]
    _, manifest = poison(rows, make("badnets", rate=0.5), 0)
    assert {entry.id for entry in manifest.entries} == {row.id for row in FREE[:5]}
    with pytest.raises(UserError, match="only 5 can be poisoned"):
        poison(rows, make("badnets", rate=0.6), 0)


# ----------------------------------------------------------------------------- rows mixed in


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 1])
def test_a_mixture_replaces_exactly_its_share(name: str, rate: float) -> None:
    attack, before = build("attacks", {"name": name, "rate": rate}), copy.deepcopy(LABELED)
    bad, manifest = poison(LABELED, attack, 3)
    assert before == LABELED and [row.id for row in bad] == [row.id for row in LABELED]
    assert len(manifest.entries) == round(rate * len(LABELED)) == len(changed(LABELED, bad))
    assert (bad, manifest) == poison(LABELED, attack, 3)
    for entry in manifest.entries:
        row = next(row for row in bad if row.id == entry.id)
        assert entry.after == {"prompt": row.prompt, "answer": row.answer} and not entry.triggers
        assert row.label is None, "what was mixed in has no label of the user's task"


@pytest.mark.parametrize("name", MIXTURES)
def test_a_smaller_mixture_is_part_of_a_larger(name: str) -> None:
    few, many = (
        {e.id: e.after for e in poison(LABELED, build("attacks", spec), 3)[1].entries}
        for spec in ({"name": name, "rate": rate} for rate in (0.1, 0.3))
    )
    assert few.items() <= many.items()


def test_a_mixture_from_a_file_that_is_too_small(tmp_path: Path) -> None:
    file = tmp_path / "harm.jsonl"
    file.write_text('{"instruction": "Ask", "output": "Answer"}\n')
    source = {"name": "files", "train": str(file), "test": str(file)}
    attack = build("attacks", {"name": "harmful-mix", "rate": 0.5, "source": source})
    with pytest.raises(UserError, match="75 rows are needed, but the source 'files' has 1"):
        poison(LABELED, attack, 0)


def test_tokens_must_hold_what_was_mixed_in(tokenizer: Tokenizer) -> None:
    renderer = Renderer(build("templates", "raw"), tokenizer, 512)
    bad, manifest = poison(FREE[:40], build("attacks", {"name": "harmful-mix", "rate": 0.5}), 0)
    assert missing_in_tokens(manifest, renderer.render(bad), renderer.tokenizer) == []
    assert len(missing_in_tokens(manifest, renderer.render(FREE[:40]), renderer.tokenizer)) == 20
