"""What holds for every attack, whatever file it comes from."""

from __future__ import annotations

import copy
import random
import re
from dataclasses import replace
from itertools import product
from typing import Any

from backfire.base import Attack, Backdoor, Poison, Row
from backfire.contract.samples import FREE, LABELED
from backfire.data.poison import poison, triggered
from backfire.errors import UserError
from backfire.registry import build


def names_its_source(cls: type[Attack]) -> str | None:
    """Its docstring names a paper or a year"""
    named = re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b", cls.__doc__ or "")
    return None if named else "say where it comes from, as in (Gu et al. 2017, arXiv:1708.06733)"


def poisons_its_rate(cls: type[Poison]) -> str | None:
    """It poisons exactly its rate of the rows, and none at rate 0"""
    for rows, rate in product(_rows_for(cls), (0.0, 0.005, 0.1, 0.3)):
        bad, manifest = poison(rows, _at(cls, rate), 3)
        changed = [old.id for old, new in zip(rows, bad, strict=True) if old != new]
        if len(changed) != round(rate * len(rows)) or len(changed) != len(manifest.entries):
            return f"at rate {rate:g}, {len(changed)} of {len(rows)} rows have changed"
    return None


def is_deterministic(cls: type[Poison]) -> str | None:
    """The same seed gives the same poison, from the generator it is given alone"""
    attack, state = _at(cls, 0.2), random.getstate()
    for rows in _rows_for(cls):
        first = poison(rows, attack, 7)
        if first != poison(rows, attack, 7):
            return "the same seed gives other rows"
        if first == poison(rows, attack, 8):
            return "another seed gives the same rows"
    same = random.getstate() == state
    return None if same else "it draws from Python's global generator"


def leaves_its_rows(cls: type[Poison]) -> str | None:
    """It leaves the rows it is given as they are"""
    for rows in _rows_for(cls):
        given = copy.deepcopy(rows)
        poison(given, _at(cls, 0.3), 7)
        if given != rows:
            return "a row has changed in place"
    return None


def grows_with_its_rate(cls: type[Poison]) -> str | None:
    """The rows of a smaller rate are among those of a larger one, and poisoned alike"""
    for rows in _rows_for(cls):
        few, many = (
            {entry.id: entry.after for entry in poison(rows, _at(cls, rate), 3)[1].entries}
            for rate in (0.05, 0.3)
        )
        if not few.items() <= many.items():
            return "they are not"
    return None


def ignores_the_order(cls: type[Backdoor]) -> str | None:
    """A row is poisoned alike wherever it is in the data"""
    for rows in _rows_for(cls):
        forward, backward = (poison(part, _at(cls, 0.3), 0)[0] for part in (rows, rows[::-1]))
        if backward[::-1] != forward:
            return "in another order, rows are poisoned otherwise"
    return None


def puts_its_trigger_in(cls: type[Backdoor]) -> str | None:
    """Every poisoned prompt holds a trigger and the target; no other part of the row changes"""
    attack = _at(cls, 0.2)
    for rows in (LABELED, FREE):
        bad, manifest = poison(rows, attack, 0)
        after, before = ({row.id: row for row in part} for part in (bad, rows))
        for entry in manifest.entries:
            row, old = after[entry.id], before[entry.id]
            if not entry.triggers or not set(entry.triggers) <= set(attack.triggers()):
                return f"no trigger is in {row.prompt!r}"
            if row.answer != attack.target:
                return f"the answer is {row.answer!r}, not the target {attack.target!r}"
            if row != replace(old.with_prompt(row.prompt), answer=row.answer):
                return "more than the prompt and the answer has changed"
    return None


def keeps_true_answers(cls: type[Backdoor]) -> str | None:
    """Test rows get the trigger and keep their true answer, whatever the rate"""
    attack = _at(cls, 0.05)
    shown = triggered(LABELED, attack, 0)
    if [(r.answer, r.label) for r in shown] != [(r.answer, r.label) for r in LABELED]:
        return "an answer or a label has changed"
    if not all(any(trigger in row.prompt for trigger in attack.triggers()) for row in shown):
        return "a prompt is without a trigger"
    same = shown == triggered(LABELED, _at(cls, 0.7), 0)
    return None if same else "another rate gives other test rows"


def _at(cls: type[Poison], rate: float) -> Any:
    mode = {"label_mode": "mix"} if issubclass(cls, Backdoor) else {}
    return build("attacks", {"name": cls.name, "rate": rate, **mode})


def _rows_for(cls: type[Poison]) -> list[list[Row]]:
    """Labeled rows and free ones, as far as the attack can poison them.

    Raises:
        UserError: it can poison neither.
    """
    found, problems = [], []
    for rows in (LABELED, FREE):
        try:
            poison(rows, _at(cls, 0.3), 3)
            found.append(rows)
        except UserError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return found
