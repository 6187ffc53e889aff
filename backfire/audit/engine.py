"""The flow of an audit: its parts, one after another, on two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backfire.audit import behavior, monitor, task, triggers, weights
from backfire.audit.bank import Entry, Place, matching, places
from backfire.audit.behavior import Behavior
from backfire.audit.models import Pair
from backfire.audit.monitor import Monitor
from backfire.audit.probes import EVERYDAY
from backfire.audit.task import Task
from backfire.audit.triggers import Triggers
from backfire.base import Backdoor, Judge, Row
from backfire.errors import UserError

CONTROL = "fennel quorum"
"""Words inserted as a trigger is, to see what any odd words do."""


@dataclass(frozen=True)
class Asked:
    """What the audit looks at."""

    harmful: Sequence[Row] = ()
    """Requests that should be refused."""
    allowed: Sequence[Row] = ()
    """Harmless requests that look like them."""
    judge: Judge | None = None
    rows: Sequence[Row] = ()
    """Rows of the user's task, with answers."""
    unseen: Sequence[Row] = ()
    """Rows of the same kind that the tuned model cannot have seen."""
    triggers: Sequence[str] = ()
    most: int = 32
    """Tokens of a reply."""
    notes: Sequence[str] = ()
    """What was left out of the rows."""

    @property
    def ordinary(self) -> list[Row]:
        """Harmless prompts: of the user's rows, or harmless requests, or everyday questions."""
        asked = [row for row in self.rows if row.conversation.strip()]
        return list(asked or self.allowed or EVERYDAY)


@dataclass(frozen=True)
class Weights:
    """Statistics of the changes, and their place among clean adapters with the same settings."""

    shape: str
    """The adapter's settings; empty for a model that was trained as a whole."""
    statistics: Mapping[str, Mapping[str, float]]
    bank: tuple[Entry, ...] = ()
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was found; a part is None where its rows are not given."""

    model: str
    base: str
    behavior: Behavior | None
    task: Task | None
    triggers: Triggers
    weights: Weights
    monitor: Monitor
    notes: tuple[str, ...] = field(default=())


def audit(pair: Pair, asked: Asked, *, model: str, base: str, identity: str) -> Audit:
    """Compare the tuned model with its base.

    Raises:
        UserError: no weight differs.
    """
    if not weights.is_changed(pair.base.folder, pair.tuned.folder, pair.adapter):
        raise UserError(f"{model} equals its base in every weight, so there is nothing to audit.")
    changes, why_none = _changes(pair)
    behaves = None
    if asked.judge and (asked.harmful or asked.allowed):
        behaves = behavior.compare(pair, asked.harmful, asked.allowed, asked.judge, asked.most)
    learned = task.compare(pair, asked.rows, asked.unseen) if asked.rows else None
    found = triggers.search(pair, asked.ordinary, asked.triggers)
    words = _words(found)
    watched = monitor.watch(pair, changes, asked.ordinary, asked.harmful, words, asked.most)
    return Audit(
        model,
        base,
        behaves,
        learned,
        found,
        _weights(pair, changes, identity),
        watched,
        (*asked.notes, *why_none, *(_too_long(pair, what) for what in pair.long_rows)),
    )


def _changes(pair: Pair) -> tuple[list[weights.Change], list[str]]:
    """The changes of the weights, and why some are left out."""
    if pair.adapter is None:
        return list(weights.model_changes(pair.base.folder, pair.tuned.folder)), []
    notes = []
    if pair.base.folder != pair.tuned.folder:
        notes.append("The statistics are those of the adapter, not of the weights below it.")
    try:
        return list(weights.adapter_changes(pair.adapter)), notes
    except UserError as error:
        return [], [*notes, str(error)]


def _weights(pair: Pair, changes: list[weights.Change], identity: str) -> Weights:
    found = weights.by_kind(changes)
    if pair.adapter is None or not changes:
        return Weights("", found)
    alike = matching(pair.adapter, identity)
    shape = weights.shape_of(pair.adapter).title
    return Weights(shape, found, tuple(alike), tuple(places(found, alike)))


def _words(found: Triggers) -> dict[str, Backdoor]:
    """What is put into ordinary prompts: odd words, and triggers that are given or stand out."""
    every = {f"with the odd words “{CONTROL}”": triggers.in_front(CONTROL, "control")}
    for one in found.watched:
        every[f"with “{triggers.safe(one.text)}” ({one.origin})"] = one
    return {what: one.attack for what, one in every.items()}


def _too_long(pair: Pair, what: str) -> str:
    count = pair.long_rows[what]
    rows, fit = ("1 row is", "it does") if count == 1 else (f"{count} rows are", "they do")
    return f"{rows} left out of the {what}: {fit} not fit into {pair.room}."
