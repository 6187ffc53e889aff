"""Which settings move which key, and names that are safe as file names."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backfire import stages
from backfire.errors import UserError
from backfire.experiment import Evaluation, Machine, Train
from backfire.launch.job import RunFolder
from backfire.model.types import types_here
from backfire.registry import build
from backfire.store import Stage, Store, slug
from tests.helpers.recipes import make

OTHER = "float32" if types_here().compute == "bfloat16" else "bfloat16"  # than here


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
        ({"evaluation": {"dtype": "bfloat16"}}, {"clean"}),
        ({"evaluation": {"merged": True}}, {"clean"}),
        ({"metrics": ["accuracy"]}, set()),
        *(
            ({"train": {knob: value}}, {"train", "clean"})
            for knob, value in {
                "epochs": 1, "max_steps": 3, "batch_size": 4, "schedule": "linear",
                "warmup_share": 0.5, "weight_decay": 0.1, "clip_norm": 9, "max_length": 64,
                "compute": OTHER, "order": "by-length", "optimizer": "adamw-8bit",
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
    old, new = asdict(stages.keys(before)), asdict(stages.keys(after))
    found = {stage for stage in old if old[stage] != new[stage]}
    assert found - {"tuned"} == moved
    assert ("tuned" in found) == ("train" in moved), "without a repair they are one"
    assert stages.cell_key(before) != stages.cell_key(after)


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
        assert stages.cell_key(cell) != stages.cell_key(make()), (
            "the triggered rows differ all the same"
        )
        assert stages.keys(cell.clean_twin()) == clean
        assert stages.train(cell).slug == stages.train(make()).slug


def test_texts_and_secrets_have_a_key_for_each_type_of_evaluation() -> None:
    canary = {"attack": {"name": "canary", "digits": 2}, "data": "sandbox-help"}
    source, template = build("datasets", "sandbox-news"), build("templates", "raw")

    def found(**knobs: Any) -> list[str]:
        cell = make(**canary, evaluation=knobs)
        of_texts = stages.texts(cell, source, template, 64)
        return [of_texts, stages.secrets(cell, cell, "exact", 9).key, stages.keys(cell).tuned]

    plain, narrow = found(), found(dtype="bfloat16")
    assert plain == found(max_new_tokens=9) == found(dtype="auto")
    merged = found(merged=True)
    assert plain[0] != merged[0] and plain[1] != merged[1]
    assert [a == b for a, b in zip(plain, narrow, strict=True)] == [False, False, True]


def test_an_untuned_model_is_its_base() -> None:
    cells = [make(method="none", seed=s, attack=a) for s in (0, 1) for a in ("none", "badnets")]
    assert {stages.keys(cell).train for cell in cells} == {stages.keys(cells[0]).base}


def test_a_model_folder_is_identified_by_its_content(tiny: Path, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("a", "b", "c")]
    for copy in copies:
        copy.mkdir()
        for file in tiny.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    config = copies[2] / "config.json"
    config.write_text(config.read_text().replace("1024", "512"))
    bases = [stages.keys(make(model=str(copy))).base for copy in copies]
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
        RunFolder(tmp_path, name).cell(cell, stages.cell_key(cell)),
        Store(tmp_path).path(stages.train(cell)),
        Store(tmp_path).path(Stage("train", slug(name), "0")),
    ):
        assert path.resolve().is_relative_to(tmp_path.resolve())
        assert len(path.name) < 200
