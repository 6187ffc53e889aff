"""What a recipe refuses, in one sentence; and recipes made up at random."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from backfire import stages
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment
from backfire.recipe import load, parse, read
from tests.helpers.recipes import BASIC, LINKED, PROFILES, cells

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
    (f"{DATA}attack: none", ["attack.rate=1"], "attack 'none' has no knobs"),
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
        assert (stages.cell_key(again), stages.keys(again), again.slug) == (
            stages.cell_key(cell),
            stages.keys(cell),
            cell.slug,
        )
    return True


@pytest.mark.slow
def test_a_fuzzed_recipe_is_refused_or_round_trips() -> None:
    accepted: list[bool] = []

    @given(trees, edits, st.sampled_from([None, None, "p"]))
    @settings(max_examples=350)
    def check(tree: Any, edits: list[str], profile: str | None) -> None:
        accepted.append(refuses_or_round_trips(yaml.dump(tree), edits, profile))

    check()
    assert 0.1 < sum(accepted) / len(accepted) < 0.9, "the fuzz must reach both ends"


JUNK = ["", "{", "[", ": ", "\n- ", "&a ", "*a", "!!int ", "!!binary ", "\t", "\x00", "'", "<<: "]


@pytest.mark.slow
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
