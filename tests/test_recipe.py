"""Recipes: what they mean, what they refuse, and which cells share what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from backfire import recipe as recipes
from backfire import stages
from backfire.errors import CellError, UserError
from backfire.experiment import Evaluation, Experiment, Machine, Train, slug
from backfire.launch.job import Folder
from backfire.model.types import types_here
from backfire.recipe import load, parse, read, shipped
from backfire.store import Store
from backfire.yaml12 import read_yaml

OTHER = "float32" if types_here().compute == "bfloat16" else "bfloat16"  # than here

BASIC = """# Does it?
data: {name: sandbox-reviews, rows: 100}
attack: {name: badnets, trigger: cf}
matrix:
  method: [none, full, {name: lora, rank: 4}]
  attack.rate: [0, 0.1]
  seed: [0, 1]
"""


def cells(text: str, *edits: str, profile: str | None = None) -> list[Experiment]:
    return list(parse("r", text, edits=edits, profile=profile).cells)


def one(text: str = "data: sandbox-reviews", *edits: str) -> Experiment:
    (cell,) = cells(text, *edits)
    return cell


def make(**knobs: Any) -> Experiment:
    return Experiment.make({"data": "sandbox-reviews", **knobs})


def points(text: str, *edits: str) -> set[tuple[str, float, int]]:
    return {(c.method.name, c.rate, c.seed) for c in cells(text, *edits)}


# ------------------------------------------------------------------------------------- the matrix


def test_a_matrix_is_every_combination() -> None:
    found = cells(BASIC)
    assert points(BASIC) == {
        (m, r, s) for m in ("none", "full", "lora") for r in (0.0, 0.1) for s in (0, 1)
    }
    assert len({cell.key for cell in found}) == len(found) == 12
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


def test_whole_components_come_before_their_knobs() -> None:
    text = "data: sandbox-reviews\nmatrix: {attack.rate: [0.1], attack: [badnets, vpi]}\n"
    assert [(c.attack.name, c.rate) for c in cells(text) if c.attack] == [
        ("badnets", 0.1),
        ("vpi", 0.1),
    ]


# ----------------------------------------------------------------------------- profiles and edits


PROFILES = """
data: {name: sandbox-reviews, rows: 50}
attack: badnets
train: {epochs: 3}
profiles:
  long: {train: {epochs: 9}, data: {rows: 500}, attack: {rate: 0.2}}
  other: {data: {name: sandbox-news, rows: 7}, attack: none, matrix: {seed: [3, 4]}}
"""


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


LINKED = """data: sandbox-reviews
matrix: {"method, train.epochs": [[full, 2], [lora, 4]], seed: [0, 1]}
include: [{seed: 9}]
exclude: [{seed: 1}]
"""


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


# ----------------------------------------------------------------------------------------- errors


DATA = "data: sandbox-reviews\n"
SEEDS = f"{DATA}matrix: {{seed: [0]}}\n"
REFUSED = [
    ("data: x\natack: badnets", "Unknown key in recipe 'r': 'atack'; did you mean 'attack'?"),
    ("data: sandbox-review", "Unknown dataset 'sandbox-review'; did you mean 'sandbox-reviews'"),
    (f"{DATA}attack: badnet", "Unknown attack 'badnet'; did you mean 'badnets'?"),
    ("data: {name: sandbox-sums, row: 3}", "Unknown key in dataset 'sandbox-sums': 'row'; did you"),
    ("data: {name: sandbox-sums, 3: 4}", "Unknown key in dataset 'sandbox-sums': '3'"),
    (f"{DATA}train: {{epoch: 1}}", "Unknown key in train: 'epoch'; did you mean 'epochs'?"),
    (f"{DATA}model: {{nam: x}}", "Unknown key in model: 'nam'; did you mean 'name'?"),
    (f"{DATA}model: 3", "recipe: model: "),
    (f"{DATA}model: null", "recipe: model: "),
    (f"{DATA}train: []", "recipe: train: "),
    (f"{DATA}seed: -1", "recipe: seed: Input should be greater than or equal to 0 (got -1)"),
    (f"{DATA}seed: .nan", "recipe: seed: "),
    (f"{DATA}defense: lisa", "defense 'lisa' stands on an alignment stage; add align: to the"),
    (f"{DATA}defense: [none, liza]", "Unknown defense 'liza'; did you mean 'lisa'?"),
    (f"{DATA}matrix: {{sed: [0]}}", "Unknown setting 'sed'; did you mean 'seed'?"),
    (f"{DATA}matrix: {{seed: 0}}", "matrix: seed must be a list of values"),
    (f"{DATA}matrix: {{seed: []}}", "matrix: seed must be a list of values"),
    (f"{DATA}matrix: {{'seed, method': [0]}}", "matrix: seed, method links 2 keys"),
    (f"{DATA}matrix: [seed]", "matrix must be a mapping of keys to values, not a list"),
    (f"{DATA}matrix: {{true: [1]}}", "matrix: the key True is true or false, not a name"),
    (
        f"{DATA}matrix: {{'seed,method': [[0, full]], seed: [1]}}",
        "matrix: 'seed' is set by two axes",
    ),
    (f"{DATA}matrix: {{attack.label-mode: [mix], attack.label_mode: [mix]}}", "matrix: the axis"),
    (
        f"{DATA}train: [epochs: 2]",
        "recipe: train: settings are needed, as in {setting: value} (got",
    ),
    (f"{DATA}attack: [badnets, vpi]", "recipe: attack: one attack is needed, by its name or as"),
    (f"{DATA}metrics: 3", "recipe: metrics.0: one metric is needed, by its name or as {name:"),
    (f"{DATA}defense: {{lisa: {{rho: 1}}}}", "A defense needs a name, as in {name: lisa}; got"),
    (f"{DATA}seed: true", "recipe: seed: a number is needed (got True)"),
    (
        f"{DATA}attack: {{name: badnets, rate: yes}}",
        "attack 'badnets': rate: Input should be a valid",
    ),
    (f"{DATA}attack: {{name: badnets, rate: true}}", "attack 'badnets': rate: a number is needed"),
    (f"{DATA}train:\n\tepochs: 1", "r, line 3: not valid YAML: found character '\\t' that cannot"),
    (f"{DATA}template: @x", "r, line 2: not valid YAML: found character '@' that cannot start any"),
    (f"{DATA}---\n{DATA}", "r, line 2: not valid YAML: found another document; leave out"),
    (f"{DATA}defense: {'x' * 9000}", "Unknown defense 'xxx"),
    (
        f"{DATA}seed: {{{', '.join(f'k{n}: {n}' for n in range(3000))}}}",
        "recipe: seed: Input should",
    ),
    (f"{DATA}matrix: {{attack.rate: [1]}}", "attack.rate is set, but the recipe has no attack"),
    (f"{SEEDS}exclude: {{seed: 0}}", "exclude must be a list"),
    (f"{SEEDS}exclude: [{{sed: 0}}]", "Unknown axis in exclude: 'sed'; did you mean 'seed'?"),
    (f"{SEEDS}exclude: [{{seed: 0}}]", "The matrix has no cells"),
    (f"{SEEDS}include: [0]", "each item of include must be a mapping"),
    ("seed: 3", "Recipe 'r' says no data"),
    ("", "r must be a mapping"),
    ("- data", "r must be a mapping"),
    (f"{DATA}seed: {'[' * 3000}", "r: not valid YAML: it is nested too deeply."),
    (f"{DATA}seed: {'9' * 6000}", "r: not valid YAML: the number on line 2 is too large."),
    (f"{DATA}attack: {{badnets: {{}}}}", "An attack needs a name, as in {name: badnets}; got"),
    (f"{DATA}seed: 1\nseed: 2", "r, line 3: not valid YAML: the key 'seed' is given twice"),
    ("data: {name: x, name: y}", "r, line 1: not valid YAML: the key 'name' is given twice"),
    ("data: [", "r, line 1: not valid YAML"),
    ("data: " + "[" * 2000, "r: not valid YAML"),
    ("data: !!python/object:os.system x", "r, line 1: not valid YAML"),
    ("seed: !!bool maybe", "r: not valid YAML: a value is not what its tag says"),
    ("seed: !!timestamp now", "r: not valid YAML: a value is not what its tag says"),
    ("seed: !!int ''", "r: not valid YAML: a value is not what its tag says"),
    (f"{DATA}seed: 0x{'f' * 5000}", "r: not valid YAML: the number on line 2 is too large"),
]
REFUSED_EDITS = [
    (DATA, ["seed"], "An edit looks like key=value"),
    (DATA, ["=3"], "An edit looks like key=value"),
    (DATA, ["sed=3"], "Unknown setting 'sed'; did you mean 'seed'?"),
    (DATA, ["train.batch\u2013size=3"], "'train.batch\u2013size' holds a typographic dash"),
    (DATA, ["train.epochs=!!binary aGk="], "train: epochs: Input should be a valid number"),
    (DATA, ["train.epoch=3"], "Unknown key in train: 'epoch'; did you mean 'epochs'?"),
    (DATA, ["seed.x=3", "seed=1"], "seed.x cannot be set: seed is 1"),
    (DATA, ["seed=["], "value of seed, line 1: not valid YAML"),
    (DATA, ["matrix.seed=3"], "matrix: seed must be a list"),
    (DATA, ["matrix=3"], "matrix must be a mapping of keys to values, not a number"),
    (DATA, ["matrix.=[3]"], "An edit looks like key=value"),
    (DATA, ["matrix.a b=[3]"], "An edit looks like key=value"),
    (DATA, ["matrix.sed=[3]"], "Unknown setting 'sed'; did you mean 'seed'?"),
    (SEEDS, ["matrix.sede=null"], "Unknown axis to remove: 'sede'; did you mean 'seed'?"),
    (LINKED, ["method=[full]"], "matrix: 'method' is set by two axes, 'method, train.epochs' and"),
    (LINKED, ["matrix.method=[full]"], "matrix: 'method' is set by two axes"),
    (DATA, ["include={seed: 1}"], "include must be a list of mappings, not a mapping"),
    (SEEDS, ["exclude=[{sede: 1}]"], "Unknown axis in exclude: 'sede'; did you mean 'seed'?"),
    (SEEDS, ["exclude=[{seed: 1}]", "matrix={}"], "Unknown axis in exclude: 'seed'"),
    (DATA, ["profiles={}"], "Profiles are no part of an edit; choose one with --profile"),
    (DATA, ["\u2013workers=3"], "An option begins with two plain hyphens"),
    (DATA, ["metrics=[accuracy,"], "value of metrics, line 1: not valid YAML: expected the node"),
    (DATA, ["seed=[0, 1]"], "recipe: seed: Input should be a valid integer (got [0, 1]); several"),
    (
        DATA,
        ["attack={name: badnets, target: 1}"],
        "attack 'badnets': target: Input should be a valid",
    ),
    (DATA, ["attack={name: badnets, rate: 5%}"], "attack 'badnets': rate: Input should be a valid"),
    (DATA, ["attack={name: badnets, rate: '0,05'}"], "attack 'badnets': rate: Input should be a"),
    (f"{DATA}attack: none", ["attack.rate=1"], "attack 'none' has no knobs"),
]


@pytest.mark.parametrize(
    ("text", "edits", "sentence"),
    [*((text, [], sentence) for text, sentence in REFUSED), *REFUSED_EDITS],
    ids=range(len(REFUSED) + len(REFUSED_EDITS)),
)
def test_what_is_not_understood_is_one_sentence(text: str, edits: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse("r", text, edits=edits)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("edit", "hint"),
    [
        ("metrics=[accuracy,", "put quotes around the whole edit: 'metrics=[...]'."),
        ("seed=[0, 1]", "(got [0, 1]); several values to try go under matrix."),
        (
            "attack={name: badnets, target: 1}",
            """put it in quotes if it is meant as a text: '"1"'.""",
        ),
        ("attack={name: badnets, rate: 5%}", "write a share, such as 0.05 for 5 %."),
        ("attack={name: badnets, rate: '0,05'}", "decimals have a point."),
        ("template=@x", "put a text that begins with it in quotes."),
        ("attack={name: badnets, trigger: {a: b}}", "put a text that holds ': ' in quotes"),
        ("template=a #b", "value of template: from # on it is a comment; put a text with # in"),
        ("template=#", "value of template: from # on it is a comment"),
        ("template=*", "put a text that begins with * or & in quotes."),
    ],
)
def test_an_error_says_what_to_write(edit: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        parse("r", DATA, edits=[edit])


def test_a_number_sign_in_quotes_is_no_comment() -> None:
    edit = "attack={name: badnets, trigger: '#tag #b'}"
    assert cells(DATA, edit)[0].attack.trigger == "#tag #b"  # type: ignore[union-attr]
    assert cells(DATA, "attack={name: badnets, trigger: a#b}")[0].attack.trigger == "a#b"  # type: ignore[union-attr]


def test_an_unknown_profile_says_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"Unknown profile of recipe 'r': 'lon'; did you mean 'long'\?"
    ):
        parse("r", PROFILES, profile="lon")


def test_a_matrix_has_a_limit() -> None:
    wide = f"matrix: {{seed: {list(range(200))}, train.epochs: {list(range(1, 101))}}}"
    with pytest.raises(UserError, match="The matrix has 20000 cells; at most 10000 are allowed"):
        parse("r", f"data: sandbox-reviews\n{wide}")


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


# ------------------------------------------------------------------------------- shipped recipes


def profiles_of(name: str) -> list[tuple[str, str | None]]:
    found = yaml.safe_load(read(name)[1]).get("profiles") or {}
    return [(name, None), *((name, profile) for profile in found)]


@pytest.mark.parametrize(
    ("name", "profile"), [pair for name in shipped() for pair in profiles_of(name)]
)
def test_every_shipped_recipe_parses(
    name: str, profile: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"\b(?:train|test): ([\w.-]+\.\w+)", read(name)[1]):
        (tmp_path / file).touch()  # keys hash the files of a recipe, whatever is in them
    loaded = load(name, profile=profile)
    assert loaded.cells and len({cell.key for cell in loaded.cells}) == len(loaded.cells)
    assert loaded.question != name, "its first line asks the question"
    assert "Expected:" in loaded.text, "say beforehand what you expect"


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("knob", Machine.model_fields)
def test_no_machine_setting_is_in_a_key(knob: str) -> None:
    with pytest.raises(UserError, match=f"Unknown key in .*'{knob}'"):
        make(**{knob: 1})


@pytest.mark.parametrize(
    ("knobs", "moved"),
    [
        ({"seed": 1}, {"poison", "train", "clean"}),
        ({"model": {"name": "sandbox", "dtype": "bfloat16"}}, {"base", "train", "clean"}),
        ({"model": "a/b"}, {"base", "train", "clean"}),
        ({"model": {"name": "a/b", "revision": "v1"}}, {"base", "train", "clean"}),
        ({"data": "sandbox-news"}, {"data", "poison", "train", "clean"}),
        ({"data": {"name": "sandbox-reviews", "rows": 9}}, {"data", "poison", "train", "clean"}),
        ({"data": {"name": "sandbox-reviews", "noise": 0.5}}, {"data", "poison", "train", "clean"}),
        ({"template": "alpaca"}, {"train", "clean"}),
        ({"attack": {"name": "badnets", "rate": 0.1}}, {"poison", "train", "clean"}),
        ({"attack": {"name": "badnets", "trigger": "cf"}}, {"poison", "train", "clean"}),
        ({"attack": {"name": "badnets", "target": "neutral"}}, {"poison", "train", "clean"}),
        ({"attack": {"name": "badnets", "label_mode": "mix"}}, {"poison", "train", "clean"}),
        ({"attack": "vpi"}, {"poison", "train", "clean"}),
        ({"method": "lora"}, {"train", "clean"}),
        ({"method": {"name": "full", "learning_rate": 0.5}}, {"train", "clean"}),
        ({"evaluation": {"max_new_tokens": 3}}, {"clean"}),
        ({"metrics": ["accuracy"]}, set()),
        *(
            ({"train": {knob: value}}, {"train", "clean"})
            for knob, value in {
                "epochs": 1, "max_steps": 3, "batch_size": 4, "schedule": "linear",
                "warmup_share": 0.5, "weight_decay": 0.1, "clip_norm": 9, "max_length": 64,
                "compute": OTHER, "order": "by-length",
                "final_share": 0.1, "beta2": 0.9, "on_long_row": "skip",
            }.items()
        ),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)  # fmt: skip
def test_a_knob_moves_the_keys_of_the_stages_it_changes_and_no_other(
    knobs: dict[str, Any], moved: set[str]
) -> None:
    before, after = make(attack="badnets"), make(**{"attack": "badnets", **knobs})
    old, new = before.keys.model_dump(), after.keys.model_dump()
    found = {stage for stage in old if old[stage] != new[stage]}
    assert found - {"tuned"} == moved
    assert ("tuned" in found) == ("train" in moved), "without a repair they are one"
    assert before.key != after.key


def test_the_list_of_knobs_above_is_whole() -> None:
    """A knob of `Train` or `Evaluation` that is new must be added to the test above."""
    source = Path(__file__).read_text(encoding="utf-8")
    for cls in (Train, Evaluation):
        assert [knob for knob in cls.model_fields if f'"{knob}":' not in source] == []


def test_rate_zero_is_one_training_run_for_all_attacks() -> None:
    clean = stages.keys(make())
    for attack in ("badnets", "vpi", {"name": "ctba", "target": "neutral"}):
        spec = {"name": attack} if isinstance(attack, str) else attack
        cell = make(attack={**spec, "rate": 0})
        assert (stages.keys(cell).train, stages.keys(cell).poison) == (clean.train, clean.poison)
        assert cell.key != make().key, "the triggered rows differ all the same"
        assert cell.clean_twin().keys == clean
        assert cell.slug_of_training == make().slug_of_training


def test_an_untuned_model_is_its_base() -> None:
    cells = [make(method="none", seed=s, attack=a) for s in (0, 1) for a in ("none", "badnets")]
    assert {stages.keys(cell).train for cell in cells} == {stages.keys(cells[0]).base}


def test_a_model_folder_is_known_by_its_content(tiny: Path, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("a", "b", "c")]
    for copy in copies:
        copy.mkdir()
        for file in tiny.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    config = copies[2] / "config.json"
    config.write_text(config.read_text().replace("1024", "512"))
    bases = [make(model=str(copy)).keys.base for copy in copies]
    assert bases[0] == bases[1] != bases[2]


# ------------------------------------------------------------------------------------- safe names


@given(st.text(max_size=200) | st.lists(st.sampled_from(["..", "/", "\\", "\0", "a"])).map("".join))
@settings(max_examples=300)
def test_a_slug_is_a_safe_file_name(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", slug(text))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/abs", "a\0b", "..", "-rf", "x" * 5000, "é漢"]
)
def test_hostile_names_stay_inside_the_root(name: str, tmp_path: Path) -> None:
    cell = make(attack={"name": "badnets", "trigger": name, "target": name})
    for path in (
        Folder(tmp_path, name).cell(cell, cell.key),
        Store(tmp_path).path("train", cell.slug_of_training, stages.keys(cell).train),
        Store(tmp_path).path("train", slug(name), "0"),
    ):
        assert path.resolve().is_relative_to(tmp_path.resolve())
        assert len(path.name) < 200


# ------------------------------------------------------------------------------------------- fuzz


KEYS = [
    *("model", "data", "template", "attack", "method", "defense", "train", "evaluation", "metrics"),
    *("seed", "matrix", "include", "exclude", "profiles", "name", "rate", "target", "rank", "rows"),
    *("attack.rate", "seed, method", "train.batch-size", "epochs", "trigger", "labels", "columns"),
]
WORDS = [
    *("sandbox", "sandbox-reviews", "files", "badnets", "none", "full", "lora", "raw", "chat"),
    *("accuracy", "negative", "", "..", "x.csv", "\ud83d", "\x1b[31m", "a/b", "1e5", "~"),
]  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
    | st.dates()
)
values: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        scalars
        | st.lists(values, max_size=2)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers(), values, max_size=2)
    )
)


def mostly(*sane: Any) -> st.SearchStrategy[Any]:
    """One of these nine times in ten, else anything."""
    good = st.sampled_from(sane)
    return st.integers(0, 9).flatmap(lambda n: good if n else values)


trees = st.fixed_dictionaries(
    {"data": mostly("sandbox-reviews", {"name": "sandbox-news", "rows": 5})},
    optional={
        "model": mostly("sandbox", "a/b", {"name": "a/b", "revision": "v1"}),
        "attack": mostly("badnets", {"name": "vpi", "rate": 0.5}, "none"),
        "method": mostly("full", {"name": "lora", "rank": 2}),
        "template": mostly("alpaca", "chat"),
        "seed": mostly(0, 3, -1),
        "train": mostly({"epochs": 3}, {"batch-size": 2, "max_steps": 1}, {"epochs": 1e400}),
        "metrics": mostly([], ["accuracy", "f1"], "attack-success"),
        "matrix": st.dictionaries(
            st.sampled_from(["seed", "method", "attack", "seed, train.epochs", "attack.rate"]),
            mostly([0, 1], ["full"], ["badnets", "vpi"], [[1, 2]], [{"name": "vpi"}]),
            max_size=1,
        ),
        "include": mostly([{"seed": 5}], [{"attack": "vpi", "attack.rate": 1}]),
        "exclude": mostly([], [{"seed": 0}]),
        "profiles": mostly({"p": {"seed": 4}}, {"p": {"matrix": {"seed": [1]}}}),
    },
)
edits = st.lists(
    st.sampled_from(["seed=1", "attack.rate=0.1", "data.rows=4", "matrix.seed=[1]", "seed=[2]"])
    | st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(["", "1", "[", "{a: 1}"])),
    max_size=1,
)


def refuses_or_round_trips(text: str, edits: list[str], profile: str | None) -> bool:
    try:
        loaded = parse("fuzz", text, edits=edits, profile=profile)
    except (UserError, CellError) as error:
        assert str(error).strip()
        return False
    for cell in loaded.cells:
        again = Experiment.make(yaml.safe_load(yaml.safe_dump(cell.spec(), allow_unicode=True)))
        assert (again.key, stages.keys(again), again.slug) == (
            cell.key,
            stages.keys(cell),
            cell.slug,
        )
    return True


def test_a_fuzzed_recipe_is_refused_or_round_trips() -> None:
    accepted: list[bool] = []

    @given(trees, edits, st.sampled_from([None, None, "p"]))
    @settings(max_examples=350)
    def check(tree: Any, edits: list[str], profile: str | None) -> None:
        accepted.append(refuses_or_round_trips(yaml.dump(tree), edits, profile))

    check()
    assert 0.1 < sum(accepted) / len(accepted) < 0.9, "the fuzz must reach both ends"


JUNK = ["", "{", "[", ": ", "\n- ", "&a ", "*a", "!!int ", "!!binary ", "\t", "\x00", "'", "<<: "]


@given(st.data())
@settings(max_examples=150)
def test_a_mangled_recipe_is_refused_or_round_trips(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([BASIC, PROFILES, read("tour")[1], read("_starter")[1]]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        junk = data.draw(st.sampled_from(JUNK))
        text = text[:place] + junk + text[place + length :]
    refuses_or_round_trips(text, [], None)


def test_recipes_never_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = one().key
    for name in ("BACKFIRE_CACHE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "BACKFIRE_SEED"):
        monkeypatch.setenv(name, "7")
    assert one().key == before
    assert recipes.parse("another name", "data: sandbox-reviews").cells[0].key == before
