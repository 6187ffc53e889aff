"""Recipes: the matrix, profiles, edits, and YAML as it is meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from backfire import recipe as recipes
from backfire import stages
from backfire.errors import UserError
from backfire.recipe import load, parse
from backfire.yaml12 import read_yaml
from tests.helpers.recipes import BASIC, LINKED, PROFILES, cells, one, points


def test_a_matrix_is_every_combination() -> None:
    found = cells(BASIC)
    assert points(BASIC) == {
        (m, r, s) for m in ("none", "full", "lora") for r in (0.0, 0.1) for s in (0, 1)
    }
    assert len({stages.cell_key(cell) for cell in found}) == len(found) == 12
    assert {cell.attack.trigger for cell in found if cell.attack} == {"cf"}  # type: ignore[attr-defined]


def test_each_cell_remembers_its_point() -> None:
    loaded = parse("r", BASIC)
    for cell, axes in zip(loaded.cells, loaded.axes, strict=True):
        assert set(axes) == {"method", "attack.rate", "seed"}
        assert (axes["attack.rate"], axes["seed"]) == (cell.rate, cell.seed)


def test_exclude_takes_away_and_include_adds() -> None:
    text = BASIC + "exclude: [{method: none, attack.rate: 0.1}, {method: lora}]\n"
    assert points(text) == {("none", 0.0, 0), ("none", 0.0, 1)} | {
        ("full", r, s) for r in (0.0, 0.1) for s in (0, 1)
    }
    text += "include: [{method: full, attack.rate: 0.5, seed: 9}]\n"
    assert points(text) >= {("full", 0.5, 9)} and len(points(text)) == 7


def test_an_equal_cell_is_kept_once() -> None:
    text = "data: sandbox-reviews\nmatrix: {seed: [0, 1, 0]}\ninclude: [{seed: 1}]\n"
    assert [cell.seed for cell in cells(text)] == [0, 1]


def test_linked_axes_move_together() -> None:
    text = 'data: sandbox-reviews\nmatrix: {"method, train.epochs": [[full, 2], [lora, 4]]}\n'
    assert [(c.method.name, c.train.epochs) for c in cells(text)] == [("full", 2.0), ("lora", 4.0)]
    # An edit pins one of the two; the other still varies.
    pinned = cells(text, "train.epochs=1")
    assert [(c.method.name, c.train.epochs) for c in pinned] == [("full", 1.0), ("lora", 1.0)]
    assert parse("r", text, edits=["train.epochs=1"]).axes == (
        {"method": "full"},
        {"method": "lora"},
    )


def test_an_axis_shows_what_an_edit_sets_in_it() -> None:
    text = "matrix: {data: [{name: sandbox-reviews, rows: 500}, sandbox-help]}\n"
    assert parse("r", text, edits=["data.rows=60"]).axes == (
        {"data": {"name": "sandbox-reviews", "rows": 60}},
        {"data": "sandbox-help"},
    )


def test_whole_components_come_before_their_knobs() -> None:
    text = "data: sandbox-reviews\nmatrix: {attack.rate: [0.1], attack: [badnets, vpi]}\n"
    assert [(c.attack.name, c.rate) for c in cells(text) if c.attack] == [
        ("badnets", 0.1),
        ("vpi", 0.1),
    ]


def test_profiles_merge() -> None:
    plain, long = one(PROFILES), cells(PROFILES, profile="long")[0]
    assert (plain.train.epochs, plain.data.rows, plain.rate) == (3, 50, 0.05)
    assert (long.train.epochs, long.data.rows, long.rate) == (9, 500, 0.2)
    assert (long.attack and long.attack.name, long.data.name) == ("badnets", "sandbox-reviews")


def test_another_component_is_not_mixed_with_the_old_one() -> None:
    other = cells(PROFILES, profile="other")
    assert [(c.data.name, c.data.rows, c.attack, c.seed) for c in other] == [
        ("sandbox-news", 7, None, seed) for seed in (3, 4)
    ]


def test_an_edit_wins_over_a_profile() -> None:
    assert [c.train.epochs for c in cells(PROFILES, "train.epochs=1", profile="long")] == [1]


def test_edits_reach_nested_knobs_with_dashes_or_underscores() -> None:
    assert one("data: sandbox-reviews", "train.batch-size=4").train.batch_size == 4
    assert one("data: sandbox-reviews", "train.batch_size=4").train.batch_size == 4
    assert one("data: sandbox-reviews", "method.learning-rate=1e-4").method.learning_rate == 1e-4
    assert one("data: sandbox-reviews", "model.dtype=bfloat16").model.dtype == "bfloat16"
    assert one("data: sandbox-reviews", "template=alpaca").template.name == "alpaca"
    assert one("data: sandbox-news", "data=sandbox-reviews").data.name == "sandbox-reviews"
    assert one("train: {epochs: 1}", "data=sandbox-sums").data.name == "sandbox-sums"
    assert one("data: sandbox-reviews", "attack={name: vpi, rate: 0.3}").rate == 0.3


def test_a_list_replaces_an_axis_and_a_value_removes_it() -> None:
    assert points(BASIC, "seed=[7, 8, 9]", "method=full", "attack.rate=0.5") == {
        ("full", 0.5, seed) for seed in (7, 8, 9)
    }
    assert points(BASIC, "matrix.seed=[5]", "attack.rate=[0.3]", "method=[full]") == {
        ("full", 0.3, 5)
    }
    dashed = "data: sandbox-reviews\nattack: vpi\nmatrix: {attack.label-mode: [dirty, clean]}\n"
    found = cells(dashed, "attack.label_mode=[mix]")
    assert [c.attack.label_mode for c in found if c.attack] == ["mix"]


def test_an_edit_reaches_into_a_component_that_an_axis_or_include_chose() -> None:
    """Were the axis to win, an edit on the command line would be dropped without a word."""
    text = "data: sandbox-reviews\nmatrix: {method: [full, lora]}\ninclude: [{method: none}]\n"
    found = cells(text, "method.learning_rate=0.5")
    assert [c.method.name for c in found] == ["full", "lora", "none"]
    assert {c.method.learning_rate for c in found} == {0.5}
    text = "data: sandbox-reviews\nmatrix: {attack: [badnets, {name: vpi, rate: 0.2}]}\n"
    assert {c.rate for c in cells(text, "attack.rate=0.01")} == {0.01}


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ([], {("full", 2, 0), ("lora", 4, 0), ("full", 2, 9)}),
        (["include=[]"], {("full", 2, 0), ("lora", 4, 0)}),
        (
            ["exclude=[]", "include=null"],
            {("full", 2, 0), ("full", 2, 1), ("lora", 4, 0), ("lora", 4, 1)},
        ),
        (["matrix={}"], {("full", 2, 0), ("full", 2, 9)}),
        (["matrix={seed: [5, 6], method: [lora]}", "include=[]"], {("lora", 2, 5), ("lora", 2, 6)}),
        (["matrix.seed=null"], {("full", 2, 0), ("lora", 4, 0), ("full", 2, 9)}),
        (["matrix.method, train.epochs=[[ia3, 1]]", "include=[]"], {("ia3", 1, 0)}),
        (['matrix."method,train.epochs"=[[ia3, 1]]', "include=[]"], {("ia3", 1, 0)}),
        (
            ["matrix.method, train.epochs=null", "matrix.method=[lora, ia3]", "include=[]"],
            {("lora", 2, 0), ("ia3", 2, 0)},
        ),
        (
            ["exclude=[{method: lora}]", "include=[{method: none, seed: 4}]"],
            {("full", 2, 0), ("full", 2, 1), ("none", 2, 4)},
        ),
        (["include=[]", "seed=7"], {("full", 2, 7), ("lora", 4, 7)}),
        (["include=[]", "seed=7", "exclude=[{seed: 7, method: lora}]"], {("full", 2, 7)}),
        (["include=[]", "matrix.seed=[0, 1]", "train.epochs=3", "exclude=[{train.epochs: 4}]"],
         {("full", 3, 0), ("full", 3, 1), ("lora", 3, 0), ("lora", 3, 1)}),
        (["include=[]", "seed=7", "matrix={seed: [3]}"], {("full", 2, 3)}),
        (["include=[]", "matrix.seed=[3]", "seed=7"], {("full", 2, 7), ("lora", 4, 7)}),
    ],
    ids=lambda value: str(sorted(value)),
)  # fmt: skip
def test_whole_axes_are_replaced_removed_and_added(
    edits: list[str], found: set[tuple[str, float, int]]
) -> None:
    got = [(c.method.name, c.train.epochs, c.seed) for c in cells(LINKED, *edits)]
    assert set(got) == found and len(got) == len(found)


def test_an_axis_of_components_is_set_by_an_edit() -> None:
    text = "data: sandbox-reviews\nalign: {}\nmethod: lora\n"
    found = cells(text, "matrix.defense=[none, {name: lisa, rho: 0.5}]")
    assert [c.defense_name for c in found] == ["none", "lisa"]
    assert [d.spec() for c in found for d in c.defense] == [{"name": "lisa", "rho": 0.5}]


# --------------------------------------------------------------------------------- YAML as meant


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("OFF", "OFF"), ("y", "y"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("010", "010"), ("0", 0), ("-7", -7), ("1_000", "1_000"), ("0x1F", 31), ("0b1", "0b1"),
        ("1:30", "1:30"), ("2024-05-01", "2024-05-01"), ("=", "="), ("1.2.3", "1.2.3"),
        ("1e-4", 1e-4), ("1E5", 1e5), ("2.5e+3", 2500.0), (".5", 0.5), ("5.", 5.0), ("1e", "1e"),
    ],
)  # fmt: skip
def test_plain_values_are_read_as_they_are_meant(text: str, value: Any) -> None:
    found = read_yaml(text, "x")
    assert (found, type(found)) == (value, type(value))
    assert read_yaml(f"a: {text}", "x") == {"a": value}


def test_labels_and_numbers_that_yaml_1_1_would_change() -> None:
    labels = "{No: bad, Yes: good, on: good, 010: bad, 1:30: bad, 2024-05-01: good}"
    cell = one(f"data: {{name: files, train: x.csv, labels: {labels}}}", "data.train=null")
    assert list(cell.data.labels) == ["No", "Yes", "on", "010", "1:30", "2024-05-01"]  # type: ignore[attr-defined]
    text = "data: sandbox-reviews\nattack: {name: badnets, target: No}\ntrain: {epochs: 1_0}\n"
    cell = one(text, "train.batch_size=010", "method={name: lora, learning_rate: 1e-4}")
    assert cell.attack and cell.attack.target == "No"  # type: ignore[attr-defined]
    assert (cell.train.epochs, cell.train.batch_size) == (10.0, 10)
    assert cell.method.learning_rate == 1e-4
    aligned = one("data: sandbox-reviews", "align.merge=yes", "method=lora").align
    assert aligned and aligned.merge is True


def test_recipes_are_read_by_name_or_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("# Mine?\ndata: sandbox-reviews\n")
    (tmp_path / "tour").write_text("# Not the shipped one?\ndata: sandbox-news\n")
    (tmp_path / "latin.yaml").write_bytes(b"data: \xe9")
    assert load("mine.yaml").question == "Mine?"
    assert load(str(tmp_path / "mine.yaml")).name == "mine"
    assert load("./tour").cells[0].data.name == "sandbox-news"
    for name, sentence in {
        "gone.yaml": "No such recipe file: gone.yaml",
        "turo": "Unknown recipe 'turo'; did you mean 'tour'",
        "latin.yaml": "latin.yaml is not UTF-8 text",
    }.items():
        with pytest.raises(UserError, match=re.escape(sentence)):
            load(name)


def test_recipes_never_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stages.cell_key(one())
    for name in ("BACKFIRE_CACHE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "BACKFIRE_SEED"):
        monkeypatch.setenv(name, "7")
    assert stages.cell_key(one()) == before
    assert (
        stages.cell_key(recipes.parse("another name", "data: sandbox-reviews").cells[0]) == before
    )
