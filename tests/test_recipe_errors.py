"""What a recipe refuses, in one sentence."""

from __future__ import annotations

import re

import pytest

from backfire.errors import UserError
from backfire.recipe import load, parse
from tests.helpers.recipes import LINKED, PROFILES, cells

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
    (f"{DATA}defense: lisa", "defense 'lisa' requires an alignment stage; add align: to the"),
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
    (
        f"{DATA}matrix: {{attack.label-mode: [mix], attack.label_mode: [mix]}}",
        "matrix: duplicate axis",
    ),
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
    (f"{DATA}---\n{DATA}", "r, line 2: not valid YAML: found another document; remove"),
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
    ("seed: 3", "Recipe 'r' has no data"),
    ("", "r must be a mapping"),
    ("- data", "r must be a mapping"),
    (f"{DATA}seed: {'[' * 3000}", "r: not valid YAML: it is nested too deeply."),
    (f"{DATA}seed: {'9' * 6000}", "r: not valid YAML: the number on line 2 is too large."),
    (f"{DATA}attack: {{badnets: {{}}}}", "An attack needs a name, as in {name: badnets}; got"),
    (f"{DATA}seed: 1\nseed: 2", "r, line 3: not valid YAML: duplicate key 'seed'"),
    ("data: {name: x, name: y}", "r, line 1: not valid YAML: duplicate key 'name'"),
    ("data: [", "r, line 1: not valid YAML"),
    ("data: " + "[" * 2000, "r: not valid YAML"),
    ("data: !!python/object:os.system x", "r, line 1: not valid YAML"),
    ("seed: !!bool maybe", "r: not valid YAML: a value does not match its tag"),
    ("seed: !!timestamp now", "r: not valid YAML: a value does not match its tag"),
    ("seed: !!int ''", "r: not valid YAML: a value does not match its tag"),
    (f"{DATA}seed: 0x{'f' * 5000}", "r: not valid YAML: the number on line 2 is too large"),
]
REFUSED_EDITS = [
    (DATA, ["seed"], "An edit looks like key=value"),
    (DATA, ["=3"], "An edit looks like key=value"),
    (DATA, ["sed=3"], "Unknown setting 'sed'; did you mean 'seed'?"),
    (DATA, ["train.batch\u2013size=3"], "'train.batch\u2013size' has a typographic dash"),
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
    (DATA, ["profiles={}"], "Profiles cannot be edited; choose one with --profile"),
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
    (f"{DATA}attack: none", ["attack.rate=1"], "attack 'none' has no settings"),
]


@pytest.mark.parametrize(
    ("text", "edits", "sentence"),
    [*((text, [], sentence) for text, sentence in REFUSED), *REFUSED_EDITS],
    ids=range(len(REFUSED) + len(REFUSED_EDITS)),
)
def test_invalid_recipes_are_one_sentence(text: str, edits: list[str], sentence: str) -> None:
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
            """put it in quotes if it is meant as text: '"1"'.""",
        ),
        ("attack={name: badnets, rate: 5%}", "write a share, such as 0.05 for 5 %."),
        ("attack={name: badnets, rate: '0,05'}", "write decimals with a point."),
        ("template=@x", "put text that begins with it in quotes."),
        ("attack={name: badnets, trigger: {a: b}}", "put text that holds ': ' in quotes"),
        ("template=a #b", "value of template: # begins a comment; put text with # in"),
        ("template=#", "value of template: # begins a comment"),
        ("template=*", "put text that begins with * or & in quotes."),
    ],
)
def test_an_error_shows_what_to_write(edit: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        parse("r", DATA, edits=[edit])


def test_a_number_sign_in_quotes_is_no_comment() -> None:
    edit = "attack={name: badnets, trigger: '#tag #b'}"
    assert cells(DATA, edit)[0].attack.trigger == "#tag #b"  # type: ignore[union-attr]
    assert cells(DATA, "attack={name: badnets, trigger: a#b}")[0].attack.trigger == "a#b"  # type: ignore[union-attr]


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"Unknown profile of recipe 'r': 'lon'; did you mean 'long'\?"
    ):
        parse("r", PROFILES, profile="lon")


def test_an_old_name_of_a_profile_says_the_new_one() -> None:
    for name, old in (("lisa", "real"), ("malign-labels", "qa"), ("malign-prompts", "qa")):
        with pytest.raises(UserError, match=f"'{name}': '{old}'; it is called 'small' now"):
            load(name, profile=old)
    with pytest.raises(UserError, match=r"'real'; known: "):
        load("tour", profile="real")


def test_a_matrix_has_a_limit() -> None:
    wide = f"matrix: {{seed: {list(range(200))}, train.epochs: {list(range(1, 101))}}}"
    with pytest.raises(UserError, match="The matrix has 20000 cells; at most 10000 are allowed"):
        parse("r", f"data: sandbox-reviews\n{wide}")
