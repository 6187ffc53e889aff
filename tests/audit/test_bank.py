"""The bank: what a run adds, what an adapter is compared with, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backfire.audit import bank
from backfire.audit.bank import FEWEST, Entry, bank_root
from backfire.audit.weights import shape_of
from backfire.commands.bank import _why_not
from backfire.experiment import Experiment
from backfire.store import read_json, write_json
from tests.helpers.command_line import Run
from tests.helpers.small_run import Place


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKFIRE_BANK", str(tmp_path / "bank"))


def fill(folder: Path, count: int, **changes: Any) -> None:
    """Add adapters like this one whose numbers are 0.025, 0.075, 0.125 ... times as large."""
    entry = bank.entry_of(folder, "b", clean=True, recipe={"data": {"name": "d"}})
    for n in range(count):
        grown = {
            kind: {name: value * (n + 0.5) / 20 for name, value in values.items()}
            for kind, values in entry.statistics.items()
        }
        bank.add(replace(entry, adapter=f"{n} {changes}", statistics=grown, **changes))


def test_an_entry_is_kept_once_and_read_back(clean: Path) -> None:
    entry = bank.entry_of(clean, "b", clean=True, recipe={"data": {"name": "d"}, "seed": 3})
    assert bank.add(entry) and not bank.add(entry)
    assert list(bank.entries()) == [entry]
    named = replace(entry, base="files 12", recipe={"model": {"name": "/models/small"}})
    assert (entry.base_title, named.base_title) == ("b", "small (files 12)")
    assert (entry.shape.rank, entry.shape.alpha, len(entry.shape.targets)) == (4, 16, 7)
    assert entry.title == "d"


def test_a_changed_record_is_left_out(clean: Path) -> None:
    fill(clean, 2)
    file = sorted(bank_root().glob("*.json"))[0]
    write_json(file, read_json(file) | {"clean": False})
    (bank_root() / "odd.json").write_text("[1]", "utf-8")
    assert len(list(bank.entries())) == 1


def test_places_need_enough_clean_adapters_of_the_same_kind(clean: Path) -> None:
    own = bank.entry_of(clean, "b", clean=True, recipe={})
    fill(clean, FEWEST - 1)
    fill(clean, 30, clean=False)
    assert bank.matching(clean, "another base") == []
    some = bank.matching(clean, "b")
    assert (len(some), bank.places(own.statistics, some)) == (FEWEST - 1, [])
    fill(clean, FEWEST + 3)
    some = bank.matching(clean, "b")
    assert len(some) == FEWEST + 3
    found = bank.places(own.statistics, some)
    assert {(one.below, one.above, one.n) for one in found if one.value > 0} == {(20, 3, 23)}
    assert not any(one.is_outside for one in found)
    assert len(found) == 7 * 6


def test_what_is_equal_in_all_adapters_is_not_outside(clean: Path) -> None:
    own = bank.entry_of(clean, "b", clean=True, recipe={})
    ties = [replace(own, adapter=str(n)) for n in range(FEWEST)]
    assert not any(one.is_outside for one in bank.places(own.statistics, ties))
    for scale in (0.5, 2):
        far = {
            kind: {name: value * scale for name, value in values.items()}
            for kind, values in own.statistics.items()
        }
        assert all(one.is_outside for one in bank.places(far, ties) if one.value)
    unknown = [replace(one, statistics={}) for one in ties]
    assert not any(one.is_outside for one in bank.places(own.statistics, unknown))


@pytest.mark.parametrize(
    ("defense", "why"),
    [
        ("kl", "trained under a defense (kl)"),
        (["confguard", {"name": "kl", "null": True}], "trained under a defense (kl)"),
        ("confguard", ""),
        ("none", ""),
    ],
)
def test_adapters_trained_under_a_defense_are_not_for_the_bank(defense: Any, why: str) -> None:
    cell = {"data": "sandbox-reviews", "method": "lora", "defense": defense}
    assert _why_not(Experiment.make(cell)) == why


def test_recorded_adapters_trained_under_a_defense_are_left_out(clean: Path) -> None:
    fill(clean, 2, recipe={"defense": "lisa"})
    fill(clean, 3, recipe={"defense": "none"})
    assert len(bank.matching(clean, "b")) == 3


def test_an_adapter_is_not_compared_with_itself_or_other_settings(clean: Path) -> None:
    bank.add(bank.entry_of(clean, "b", clean=True, recipe={}))
    assert bank.matching(clean, "b") == []
    other: Entry = replace(next(bank.entries()), adapter="x")
    bank.add(replace(other, shape=replace(shape_of(clean), alpha=8.0)))
    assert bank.matching(clean, "b") == []


@pytest.mark.slow
def test_a_run_adds_its_adapters(
    ran: Place, backfire: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    done = backfire("bank", "add", ran.out)
    assert (done.code, done.out.split(" added")[0]) == (0, "2 adapters")
    assert sorted(one.clean for one in bank.entries()) == [False, True]
    assert "2 adapters" in backfire("bank").out
    assert "2 were there" in backfire("bank", "add", ran.out).out
    [attacked] = [one for one in bank.entries() if not one.clean]
    assert attacked.title == "sandbox-reviews, badnets"
    assert attacked.recipe["attack"]["rate"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["add"], "Write `backfire bank`, or `backfire bank add RUN`."),
        (["remove", "."], "Write `backfire bank`"),
        (["add", "."], "it is not a run folder"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    backfire: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = backfire("bank", *arguments)
    assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1
