"""What holds for every component of every kind: a new file is tested at once."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from backfire import contract
from backfire.base import Component
from backfire.base.docstrings import documented
from backfire.contract.kinds import joins_only_its_own_rows
from backfire.errors import UserError
from backfire.experiment import Evaluation, Experiment, Machine, Model, Train
from backfire.registry import KINDS, find, names
from backfire.sandbox.base import Pretrain
from tests.update_golden import GOLDEN, current, stale

EVERY = [(kind, name) for kind in KINDS for name in names(kind)]
SETTINGS = (Model, Train, Evaluation, Experiment, Machine, Pretrain)
ELSEWHERE = {
    "metrics/toxicity": "not judged",
    "judges/policy": "rows of sandbox-policy",
    "judges/rubric": "sends replies to an endpoint",
    "judges/classifier": "is not on this machine",
    "judges/yes-no": "is not on this machine",
}
"""What a check cannot do here, and why: it takes a model, an address or rows of its own."""


GENERAL = contract.CHECKS[Component]
CASES = [
    (kind, name, check)
    for kind, name in EVERY
    for check in contract.checks(find(kind, name))
    # Published data sets are on the hub.
    if kind != "datasets" or name.startswith("sandbox") or check in GENERAL
]


@pytest.mark.parametrize(
    ("kind", "name", "check"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_contract(kind: str, name: str, check: contract.Check) -> None:
    result = contract.result_of(check, find(kind, name))
    assert result.check[0].isupper()
    if result.status == "skip":
        assert ELSEWHERE[f"{kind}/{name}"] in result.text
    else:
        assert result.status == "ok", result.text


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_file_holds_one_component_of_its_name(kind: str, name: str) -> None:
    cls = find(kind, name)
    assert cls.kind == kind
    assert Path(inspect.getfile(cls)).stem == name.replace("-", "_")
    classes = [item for item in vars(inspect.getmodule(cls)).values() if isinstance(item, type)]
    here = [c for c in classes if issubclass(c, Component) and c.__module__ == cls.__module__]
    assert here == [cls]


@pytest.mark.parametrize("name", ["booster", "crow", "dp", "ldifs", "repnoise", "vaccine"])
def test_a_defense_that_acts_in_a_pass_may_not_join(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find("defenses", name), "joins", True)
    result = contract.result_of(joins_only_its_own_rows, find("defenses", name))
    assert result.status == "fail" and "joins is True" in result.text


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_every_setting_is_described(cls: type[BaseModel]) -> None:
    fields = documented(cls).model_fields
    bare = [knob for knob, info in fields.items() if not (info.description or "").strip()]
    assert bare == [], "put a docstring under the field: what it does, its unit, its range"


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_key_that_is_no_text_is_unknown(kind: str, name: str) -> None:
    with pytest.raises(UserError, match=r"Unknown key .* '7'"):
        find(kind, name).make({7: 1})  # type: ignore[dict-item]


def test_a_key_may_have_dashes_but_not_twice() -> None:
    assert Train.make({"batch-size": 3}).batch_size == 3
    with pytest.raises(UserError, match="duplicate key 'batch_size'"):
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
    fault = stale("attacks/x", old, new)
    assert fault is None if sentence is None else sentence in str(fault)
