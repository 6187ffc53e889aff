"""The contracts of data sets, templates, judges, metrics, scanners and defenses."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import inf
from random import Random
from typing import Any, get_args

from backfire.base import (
    DataDefense,
    Dataset,
    Evidence,
    Exchange,
    Finding,
    Judge,
    Measure,
    Metric,
    ModelScanner,
    Row,
    Scanner,
    Template,
    TrainDefense,
    TrainHook,
)
from backfire.contract.samples import FREE, LABELED, evidence, measured
from backfire.errors import CellError, UserError
from backfire.registry import build
from backfire.result import Direction, Role, Unit


def loads_the_same(cls: type[Dataset]) -> str | None:
    """It loads the same rows each time, each with a unique id and an answer"""
    data = build(cls.kind, cls.name)
    train, test = (data.load(split) for split in ("train", "test"))
    if train != data.load("train") or data.fingerprint() != data.fingerprint():
        return "loading again gives other rows or another fingerprint"
    ids = [row.id for row in (*train, *test)]
    if len(set(ids)) < len(ids):
        return "two rows have the same id"
    empty = [row.id for row in (*train, *test) if not row.answer or not row.conversation.strip()]
    return f"row {empty[0]} has no prompt or no answer" if empty else None


def shows_the_row(cls: type[Template]) -> str | None:
    """Its prompt contains the row's input, and not the answer"""
    template, row = build(cls.kind, cls.name), replace(LABELED[0], answer="unheard-of")
    try:
        prompt = template.prompt(row)
    except NotImplementedError:  # it returns segments, which need a tokenizer
        return None
    if row.input not in prompt or row.answer in prompt:
        return f"the prompt is {prompt!r}"
    return (
        None if prompt == template.prompt(row) else "rendering the row again gives another prompt"
    )


def gives_each_a_verdict(cls: type[Judge]) -> str | None:
    """It gives one verdict per exchange, in order, and the same verdicts again"""
    judge = build(cls.kind, cls.name)
    if judge.destination():
        raise UserError("it sends replies to an endpoint.")
    judge.ready()
    exchanges = [
        Exchange(f"e{n}", f"Ask {n}", reply) for n, reply in enumerate(["Sure.", "", "No!"])
    ]
    verdicts = judge.judge(exchanges)
    if len(verdicts) != len(exchanges):
        return f"{len(verdicts)} verdicts on {len(exchanges)} exchanges"
    same = verdicts == judge.judge(exchanges) and verdicts[::-1] == judge.judge(exchanges[::-1])
    return None if same else "the same exchange gets another verdict"


def filters_the_same(cls: type[DataDefense]) -> str | None:
    """The same seed gives the same rows, and its input is not modified"""
    defense, rows, aligned = build(cls.kind, cls.name), copy.deepcopy(LABELED), copy.deepcopy(FREE)
    first, again = (defense.filter(rows, aligned, frozenset(), Random(5)) for _ in range(2))
    if (rows, aligned) != (LABELED, FREE):
        return "a row has changed in place"
    return None if first == again else "the same seed gives other rows"


def joins_only_its_own_rows(cls: type[TrainDefense]) -> str | None:
    """A hook with a `step` of its own, or that hooks modules, is not trained together with others:
    `joins` is False"""
    function: Any = cls.hook
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    for hook in (one for one in named if isinstance(one, type) and issubclass(one, TrainHook)):
        own = [base for base in hook.__mro__ if base not in TrainHook.__mro__]
        codes = [one.__code__ for base in own for one in vars(base).values() if _has_code(one)]
        hooks_modules = any("register_" in name for code in codes for name in code.co_names)
        if cls.joins and (hooks_modules or hook.step is not TrainHook.step):
            what = "hooks modules" if hooks_modules else "has its own step"
            return f"{hook.__name__} {what}, and joins is True"
    return None


def _has_code(value: Any) -> bool:
    return hasattr(value, "__code__")


def scans_each_row(cls: type[Scanner]) -> str | None:
    """It gives one finding per row, in order, the same again, and leaves the rows as they are"""
    scanner = build(cls.kind, cls.name)
    for rows in ([], FREE[:1], LABELED, [*FREE, *LABELED[:20], *FREE[:9]]):
        given = copy.deepcopy(rows)
        found = _found(scanner, given)
        if len(found) != len(rows):
            return f"{len(found)} findings in {len(rows)} rows"
        if given != rows:
            return "a row has changed in place"
        if found != _found(scanner, given):
            return "the same rows give other findings"
        if wrong := [f for f in found if f.flagged != (f.score >= 1) or not 0 <= f.score < inf]:
            return f"a score of {wrong[0].score:g} is flagged: {wrong[0].flagged}"
        if any(f.score and not f.reason for f in found):
            return "a row has a score without a reason"
    return None


def sees_only_what_is_learned(cls: type[Scanner]) -> str | None:
    """Ids, fields, true labels and good answers of the rows do not change what it finds"""
    scanner, rows = build(cls.kind, cls.name), [*LABELED, *LABELED[:7], *FREE]
    others = [
        replace(row, id=f"x{n % 2}", fields={"trigger": "yes"}, label=None, better=("So.",))
        for n, row in enumerate(rows)
    ]
    same = _found(scanner, rows) == _found(scanner, others)
    return None if same else "what it finds changes with ids, fields, labels or good answers"


def nulls_what_it_read(cls: type[ModelScanner]) -> str | None:
    """What it flags by chance is in measurements of its own needs, which are left as they are"""
    scanner = build(cls.kind, cls.name)
    if unknown := {*scanner.needs} - {*get_args(Measure)}:
        return f"it needs {', '.join(sorted(unknown))}, which no model measures"
    if not scanner.needs:
        return "it needs nothing of a model"
    given, before = (measured(FREE, *scanner.needs) for _ in range(2))
    if (null := scanner.by_chance_of(FREE, given)) is None:
        return None
    if repr(given) != repr(before):
        return "the measurements have changed in place"
    if not scanner.null:
        return "`null` does not say what it returns"
    return None if len(scanner.look(*null)) == len(null[0]) else "a row has no finding"


def _found(scanner: Scanner, rows: list[Row]) -> list[Finding]:
    if isinstance(scanner, ModelScanner):
        return scanner.look(rows, measured(rows, *scanner.needs))
    return list(scanner.scan(rows, rows[:5]))


def measures_the_same(cls: type[Metric]) -> str | None:
    """It gives the same numbers for the same samples, and does not modify them"""
    metric, given = build(cls.kind, cls.name), evidence()
    values, again = (metric.measure(part) for part in (given, copy.deepcopy(given)))
    if given != evidence():
        return "a sample has changed in place"
    same = repr(values) == repr(again)  # nan is not equal to itself
    return None if same else "measuring again gives other numbers"


def names_known_units(cls: type[Metric]) -> str | None:
    """The unit, role and direction of each of its numbers are known ones"""
    for value in build(cls.kind, cls.name).values(evidence()):
        for field, names in (("unit", Unit), ("role", Role), ("direction", Direction)):
            if (given := getattr(value, field)) not in get_args(names):
                known = ", ".join(get_args(names))
                return f"the {field} of '{value.metric}' is {given!r}; known: {known}"
    return None


def gives_no_number_without_samples(cls: type[Metric]) -> str | None:
    """Without samples it gives no number, or an error"""
    try:
        values = build(cls.kind, cls.name).measure(Evidence(clean=[]))
    except (UserError, CellError):
        return None
    numbers = [value.metric for value in values if value.value is not None]
    return f"it gives {numbers[0]}" if numbers else None
