"""What holds for data sets, templates, judges, metrics and defenses that filter rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from random import Random

from backfire.base import (
    DataDefense,
    Dataset,
    Evidence,
    Exchange,
    Judge,
    Metric,
    Template,
)
from backfire.contract.samples import FREE, LABELED, evidence
from backfire.errors import CellError, UserError
from backfire.registry import build


def loads_the_same(cls: type[Dataset]) -> str | None:
    """It loads the same rows each time, each with an id of its own and an answer"""
    data = build(cls.kind, cls.name)
    train, test = (data.load(split) for split in ("train", "test"))
    if train != data.load("train") or data.fingerprint() != data.fingerprint():
        return "a second look gives other rows or another fingerprint"
    ids = [row.id for row in (*train, *test)]
    if len(set(ids)) < len(ids):
        return "two rows have one id"
    empty = [row.id for row in (*train, *test) if not row.answer or not row.conversation.strip()]
    return f"row {empty[0]} has no prompt or no answer" if empty else None


def shows_the_row(cls: type[Template]) -> str | None:
    """Its prompt holds what the row asks about, and not the answer"""
    template, row = build(cls.kind, cls.name), replace(LABELED[0], answer="unheard-of")
    try:
        prompt = template.prompt(row)
    except NotImplementedError:  # it writes segments, which take a tokenizer
        return None
    if row.input not in prompt or row.answer in prompt:
        return f"the prompt is {prompt!r}"
    return None if prompt == template.prompt(row) else "a second prompt of the row is another one"


def gives_each_a_verdict(cls: type[Judge]) -> str | None:
    """It gives one verdict for each exchange, in order, and the same one again"""
    judge = build(cls.kind, cls.name)
    if judge.destination():
        raise UserError("it sends replies elsewhere.")
    judge.ready()
    asked = [Exchange(f"e{n}", f"Ask {n}", reply) for n, reply in enumerate(["Sure.", "", "No!"])]
    verdicts = judge.judge(asked)
    if len(verdicts) != len(asked):
        return f"{len(verdicts)} verdicts on {len(asked)} exchanges"
    same = verdicts == judge.judge(asked) and verdicts[::-1] == judge.judge(asked[::-1])
    return None if same else "the same exchange gets another verdict"


def filters_the_same(cls: type[DataDefense]) -> str | None:
    """The same seed gives the same rows, and leaves those it is given as they are"""
    defense, rows, aligned = build(cls.kind, cls.name), copy.deepcopy(LABELED), copy.deepcopy(FREE)
    first, again = (defense.filter(rows, aligned, frozenset(), Random(5)) for _ in range(2))
    if (rows, aligned) != (LABELED, FREE):
        return "a row has changed in place"
    return None if first == again else "the same seed gives other rows"


def measures_the_same(cls: type[Metric]) -> str | None:
    """It gives the same numbers of the same samples, and leaves the samples as they are"""
    metric, given = build(cls.kind, cls.name), evidence()
    values, again = (metric.measure(part) for part in (given, copy.deepcopy(given)))
    if given != evidence():
        return "a sample has changed in place"
    same = repr(values) == repr(again)  # nan is not equal to itself
    return None if same else "a second time, the numbers are others"


def tells_nothing_of_nothing(cls: type[Metric]) -> str | None:
    """Without samples it gives no number, or says what is missing"""
    try:
        values = build(cls.kind, cls.name).measure(Evidence(clean=[]))
    except (UserError, CellError):
        return None
    told = [value.metric for value in values if value.value is not None]
    return f"it gives {told[0]}" if told else None
