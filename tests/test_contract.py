"""What holds for every component of every kind: a new file is tested at once."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from backfire.base import Component, Config
from backfire.errors import UserError
from backfire.experiment import Evaluation, Experiment, Machine, Model, Train
from backfire.registry import KINDS, build, find, names
from backfire.sandbox.base import Pretrain
from tests.update_golden import GOLDEN, current, stale

EVERY = [(kind, name) for kind in KINDS for name in names(kind)]
PATHS = ("train", "test")
"""Knobs of data sets that say where a file lies: `fingerprint` covers its bytes instead."""
SETTINGS = (Model, Train, Evaluation, Experiment, Machine, Pretrain)


def other_value(cls: type[Config], knob: str) -> Any:
    """A valid value that is not the default, whatever the knob's type."""
    default = cls.model_fields[knob].get_default(call_default_factory=True)
    tries: list[Any] = [not default] if isinstance(default, bool) else []
    if isinstance(default, int | float) and not isinstance(default, bool):
        tries += [default + 1, default + 0.5]
    tries += [
        {"name": "sandbox-sums"},
        {"name": "lexicon"},
        "other",
        ["other"],
        3,
        {"text": "other"},
        ["a", "b"],
        {"a": "b", "b": "c"},
        "other {code}",
        [7],
        0.5,
        True,
    ]
    schema = cls.model_json_schema()
    tries += _choices([schema["properties"][knob], schema.get("$defs", {})])
    for value in tries:
        try:
            changed = cls.make({knob: value})
        except (UserError, ValidationError):
            continue
        if getattr(changed, knob) != default:
            return value
    raise AssertionError(f"no other value for {cls.__name__}.{knob}: teach this test its type")


def _choices(schema: Any) -> list[Any]:
    """Every value an enumeration in the schema allows, alone and as a list of one."""
    if isinstance(schema, dict):
        own = [form for value in schema.get("enum", ()) for form in (value, [value])]
        return own + _choices(list(schema.values()))
    if isinstance(schema, list):
        return [value for item in schema for value in _choices(item)]
    return []


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_file_holds_one_component_of_its_name(kind: str, name: str) -> None:
    cls = find(kind, name)
    assert cls.kind == kind
    assert Path(inspect.getfile(cls)).stem == name.replace("-", "_")
    assert isinstance(cls.version, int) and cls.version >= 1
    classes = [item for item in vars(inspect.getmodule(cls)).values() if isinstance(item, type)]
    here = [c for c in classes if issubclass(c, Component) and c.__module__ == cls.__module__]
    assert here == [cls]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_docstring_opens_with_a_sentence(kind: str, name: str) -> None:
    cls = find(kind, name)
    doc = cls.__dict__.get("__doc__") or ""
    first = doc.strip()[:1]
    assert first.isupper() or first.isdigit(), "`backfire list` shows the first line"
    assert doc.strip().endswith((".", ")")), doc


@pytest.mark.parametrize(
    "cls", [*(find(kind, name) for kind, name in EVERY), *SETTINGS], ids=lambda cls: cls.__name__
)
def test_every_knob_is_described(cls: type[BaseModel]) -> None:
    bare = [knob for knob, info in cls.model_fields.items() if not (info.description or "").strip()]
    assert bare == [], "put a docstring under the field: what it does, its unit, its range"


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_defaults_are_valid_and_need_no_saying(kind: str, name: str) -> None:
    component = build(kind, name)
    assert component.spec() == {"name": name}
    # `validate_default` is off for speed, so here the defaults themselves are checked.
    assert type(component).make(component.model_dump()) == component
    with pytest.raises(ValidationError, match="frozen"):
        component.anything = 1


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_knob_is_part_of_the_identity_and_survives_yaml(kind: str, name: str) -> None:
    plain = build(kind, name)
    for knob in type(plain).model_fields:
        spec = {"name": name, knob: other_value(type(plain), knob)}
        changed = build(kind, spec)
        kept_out = PATHS if kind == "datasets" else getattr(plain, "unhashed", ())
        if knob not in kept_out:
            assert changed.identity() != plain.identity(), knob
        again = build(kind, yaml.safe_load(yaml.safe_dump(changed.spec())))
        assert (again, again.identity()) == (changed, changed.identity()), knob


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_misspelt_knob_says_the_nearest(kind: str, name: str) -> None:
    cls = find(kind, name)
    for knob in cls.model_fields:
        with pytest.raises(UserError, match=f"Unknown key in {kind[:-1]} '{name}':") as caught:
            cls.make({f"{knob}x": 1})
        assert "did you mean" in str(caught.value)
    with pytest.raises(UserError, match=r"Unknown key .* '7'"):
        cls.make({7: 1})  # type: ignore[dict-item]


def test_a_key_may_have_dashes_but_not_twice() -> None:
    assert Train.make({"batch-size": 3}).batch_size == 3
    with pytest.raises(UserError, match="'batch_size' is given twice"):
        Train.make({"batch-size": 3, "batch_size": 4})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kind", "knob"), [("methods/full", "learning_rate"), ("", "epochs")])
def test_numbers_are_finite(kind: str, knob: str, value: float) -> None:
    cls = find(*kind.split("/")) if kind else Train
    with pytest.raises(UserError, match=rf"{knob}: .*(finite|greater)"):
        cls.make({knob: value})


# --------------------------------------------------------------------------------- golden defaults


@pytest.mark.parametrize("name", sorted(json.loads(GOLDEN.read_text())))
def test_no_default_changes_without_a_new_version(name: str) -> None:
    """Keys leave out knobs at their default: another default under the same version would pass
    results of the old one off as its own. A new component needs no entry here."""
    assert stale(name, json.loads(GOLDEN.read_text())[name], current().get(name)) is None


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ([1, {"rate": 0.05}], [1, {"rate": 0.05}], None),
        (
            [1, {"rate": 0.05}],
            [1, {"rate": 0.1}],
            "changed without a new version: rate 0.05 -> 0.1",
        ),
        ([1, {"rate": 0.05}], [1, {"rate": 0.05, "n": 1}], None),
        ([1, {"rate": 0.05}], [1, {}], "changed without a new version: rate 0.05 -> gone"),
        ([1, {"rate": 0.05}], [2, {"rate": 0.1}], "python tests/update_golden.py"),
        ([1, {"rate": 0.05}], None, "python tests/update_golden.py"),
    ],
)
def test_the_golden_check_itself(old: Any, new: Any, sentence: str | None) -> None:
    said = stale("attacks/x", old, new)
    assert said is None if sentence is None else sentence in str(said)
