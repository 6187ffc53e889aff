"""Keys of other tools: each is answered with ours, which exists."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from backfire import cli
from backfire.errors import UserError
from backfire.experiment import Evaluation, Experiment, Model, Safety, Train
from backfire.other_names import _SETTINGS, COMPONENTS, OTHER_NAMES, Ours
from backfire.recipe import load, parse
from backfire.registry import find, names
from backfire.sandbox.base import Pretrain
from backfire.yaml12 import read_yaml
from tests.helpers.command_line import Run

DATA = "data: sandbox-reviews\n"
KEYS = [*Experiment.model_fields, "matrix", "include", "exclude", "profiles"]
ROWS = [row for row in _SETTINGS if row.example]


def refused(text: str, *edits: str, profile: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        parse("r", text, edits=edits, profile=profile)
    return str(caught.value)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.example)
def test_advice_is_a_valid_recipe(row: Ours) -> None:
    """The example is understood as it is, and it says the key."""
    sentence: Any = read_yaml(row.example, "example")
    section, _, knob = row.key.partition(".")
    assert list(sentence) == [section]
    if knob and knob != "name":
        assert knob in sentence[section]
    if section == "matrix":
        assert len(parse("r", DATA + row.example).cells) > 1
        return
    part = getattr(Experiment.make({"data": "sandbox-reviews", **sentence}), section)
    part = part[0] if section == "defense" else part
    assert part is not None and hasattr(part, knob or "__class__")


def test_advised_options_exist() -> None:
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(cli.run).parameters}
    named = {row.key for row in _SETTINGS if row.key.startswith("--")}
    assert named and named | {"--micro-batch"} <= options
    assert all(row.remark for row in _SETTINGS if not row.key)


def test_no_name_has_two_answers_and_none_is_ours_at_the_top() -> None:
    names = [name for row in _SETTINGS for name in row.names.split()]
    assert len(names) == len({*names})
    assert not {*names} & {*KEYS}


@pytest.mark.parametrize("name", sorted({*OTHER_NAMES} - {*KEYS}))
def test_each_name_is_answered_at_the_top_of_a_recipe(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{DATA}{name}: 1\n")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / "r.yaml"))
    row, sentence = OTHER_NAMES[name], str(caught.value)
    answer = row.key.removesuffix(".name") if row.key else "there is no such setting"
    assert (
        f"'{name}'; " in sentence
        and answer in sentence
        and row.remark in sentence
        and row.example in sentence
    )
    if "-" not in row.key:
        assert refused(DATA, f"{name}=1").partition(";")[2] == sentence.partition(";")[2]


@pytest.mark.parametrize(
    ("cls", "part"),
    [
        *((Train, "train"), (Evaluation, "evaluation"), (Model, "model"), (Safety, "safety")),
        *((find("methods", "lora"), "method"), (find("methods", "qlora"), "method")),
        *((find("attacks", "badnets"), "attack"), (find("datasets", "files"), "data")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_our_own_knobs_are_recognized_in_the_wrong_place(cls: Any, part: str) -> None:
    elsewhere = {"name", "revision", "trust_remote_code", "compute", "dtype"}
    for knob in {*cls.model_fields} - {*KEYS, *elsewhere}:
        assert OTHER_NAMES[knob].key == f"{part}.{knob}"


SENTENCES: list[tuple[str, list[str], str]] = [
    ("lora_r: 8", [], "here it is method.rank, as in method: {name: lora, rank: 8}."),
    ("method: lora\nlora_r: 8", [], "as in method: {name: lora, rank: 8}."),
    ("method: lora\nmethod.rank: 8", [], "keys nest in a recipe, as in method: {name: lora, rank:"),
    ("train.final: 8", [], "keys nest in a recipe, as in train: {final: ...}."),
    ("train: {rank: 8}", [], "train: 'rank'; here it is method.rank, as in method: {name: lora,"),
    ("train: {learning_rate: 1e-4}", [], "here it is method.learning_rate, as in method: {name: "),
    ("train: {num_train_epochs: 3}", [], "'num_train_epochs'; write epochs."),
    ("train: {warmup_steps: 9}", [], "write warmup_share (a share of the steps, not their number)"),
    ("train: {seed: 1}", [], "'seed'; it belongs at the top of a recipe, as in seed: 0."),
    ("train: {bf16: true}", [], "write compute (`bfloat16`, `float16`, `float32` or `auto`)"),
    ("train: {gradient_checkpointing: true}", [], "an option of `backfire run`: --recompute."),
    ("train: {epoch: 3}", [], "did you mean 'epochs'?"),
    ("method: {name: lora, r: 8}", [], "'r'; write rank."),
    ("method: {name: lora, target: q_proj}", [], "did you mean 'targets'?"),
    ("method: {name: full, rank: 8}", [], "not every method has rank; write for instance method:"),
    ("method: {name: lora, load_in_4bit: true}", [], "as in method: qlora."),
    ("model: {torch_dtype: bfloat16}", [], "write dtype ("),
    ("model: {model_name_or_path: x}", [], "write name (a folder, a GGUF file or a hub id)."),
    ("model: {load_in_8bit: true}", [], "here it is method ("),
    ("model: {attn_implementation: sdpa}", [], "no such setting: the fastest attention"),
    ("train: {packing: true}", [], "an option of `backfire run`: --packing (rows are packed where"),
    (
        "model: {adapter_revision: main}",
        [],
        "model: merge and adapter_revision require",
    ),
    ("evaluation: {temperature: 0}", [], "there is no such setting: replies are greedy."),
    ("evaluation: {batch_size: 8}", [], "an option of `backfire run`: --eval-batch (rows per pass"),
    ("", ["report_to=wandb"], "there is no such setting: progress is printed"),
    ("attack: {name: badnets, poison_rate: 0.1}", [], "write rate (a share of the training rows"),
    ("attack: {name: malign-labels, trigger: x}", [], "not every attack has trigger; write"),
    ("align: {lora_r: 8}", [], "here it is align.method.rank, as in align: {method: {name: lora,"),
    ("align: {train: {lora_r: 8}}", [], "align.train: 'lora_r'; here it is align.method.rank"),
    ("align: {train: {num_epochs: 8}}", [], "align.train: 'num_epochs'; write epochs."),
    ("matrix: {lora_r: [4, 8]}", [], "Unknown setting 'lora_r'; here it is method.rank"),
    ("matrix: {train.lora_r: [4, 8]}", [], "Unknown key in train: 'lora_r'; here it is method.r"),
    ("matrix: {seed: [0]}\nexclude: [{seeds: 0}]", [], "axis in exclude: 'seeds'; write seed."),
    ("matrix: {seed: [0]}\ninclude: [{lora_r: 8}]", [], "here it is method.rank"),
    ("profiles: {p: {lora_r: 8}}", ["p"], "here it is method.rank"),
    ("profiles: {p: {train: {lora_r: 8}}}", ["p"], "here it is method.rank"),
    ("", ["train.lora-r=8"], "here it is method.rank"),
    ("", ["lora.r=8"], "Unknown setting 'lora'; here it is method, as in method: {name: lora,"),
    ("", ["matrix.global-batch-size=[8]"], "here it is train.batch_size (rows per optimizer step)"),
    ("seeds: [0, 1]", [], "here it is matrix.seed, as in matrix: {seed: [0, 1, 2]}."),
    ("seed: [0, 1]", [], "several values to try go under matrix"),
]


@pytest.mark.parametrize(("text", "edits", "sentence"), SENTENCES, ids=lambda value: str(value))
def test_the_answer_fits_the_place(text: str, edits: list[str], sentence: str) -> None:
    profile = edits.pop() if edits == ["p"] else None
    assert sentence in refused(DATA + text, *edits, profile=profile)


def test_outside_a_recipe_only_its_own_settings_are_named() -> None:
    for key, sentence in {
        "lr": "'lr'; write learning_rate.",
        "global_batch_size": "write batch_size (rows per optimizer step).",
        "num_layer": "did you mean 'num_layers'?",
        "temperature": "known: ",
    }.items():
        with pytest.raises(UserError) as caught:
            Pretrain.make({key: 1}, "setting")
        assert sentence in str(caught.value)


def test_the_command_line_answers_too(backfire: Run) -> None:
    for arguments, sentence in (
        (["run", "tour", "num_train_epochs=3"], "'num_train_epochs'; here it is train.epochs, as"),
        (["validate", "tour", "per-device-train-batch-size=8"], "--micro-batch N of `run` sets"),
        (
            ["run", "tour", "train.packing=true", "--dry-run"],
            "it is an option of `backfire run`: --packing (rows are packed",
        ),
        (["doctor", "tour", "matrix.lora_alpha=[8, 16]"], "here it is method.alpha"),
        (["run", "tour", "--lora-r", "8"], "--lora-r. Write method.rank=VALUE."),
        (["run", "tour", "--seed=1"], "Write seed=VALUE."),
        (["validate", "tour", "--temperature", "1"], "There is no such setting: replies are"),
        (["run", "tour", "--gradient_checkpointing"], "Write --recompute."),
        (["poison", "sandbox-reviews", "poison_rate=0.1"], "attack 'badnets': 'poison_rate'; wri"),
    ):
        output = backfire(*arguments)
        assert (output.code, output.out) == (2, "") and sentence in output.err
        assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "name", "ours"),
    [(kind, name, ours) for kind, table in COMPONENTS.items() for name, ours in table.items()],
)
def test_a_component_is_known_by_its_other_names(kind: str, name: str, ours: str) -> None:
    assert ours in names(kind) and name not in names(kind)
    with pytest.raises(UserError, match=f"'{name}'; it is called '{ours}' here"):
        find(kind, name)
