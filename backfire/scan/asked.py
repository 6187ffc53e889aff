"""Scanners with a model: the rows that it reads, what they find, and their false alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from backfire.base import Finding, ModelScanner, Row
from backfire.scan.source import Bare, Source
from backfire.text import count

if TYPE_CHECKING:
    from backfire.evaluate.reference import Reference

Chance = tuple[int, int, str]
"""Rows flagged, rows scanned, and what they are, where only false alarms are expected."""


@dataclass(frozen=True)
class Asked:
    """A model that is asked about rows."""

    name: str
    reference: Reference
    limit: int
    """Most rows that it reads; of more, a random sample."""


@dataclass
class Answers:
    """What scanners with a model find."""

    read: int = 0
    """Number of rows that the model read."""
    findings: dict[str, dict[int, Finding]] = field(default_factory=dict)
    """Scanner -> place of a row that the model read, from 0 -> its finding."""
    chance: dict[str, Chance] = field(default_factory=dict)
    """Scanner -> its false alarms, if they can be estimated."""
    notes: list[str] = field(default_factory=list)
    """Sentences about the rows that the model did not read."""


def ask(
    scanners: Sequence[ModelScanner], source: Source, test: Source | None, asked: Asked
) -> Answers:
    """The findings of these scanners; the model measures once for all of them. False alarms are
    counted on the test rows if there are any, else on measurements without what is looked for."""
    places, rows = drawn(source, asked.limit)
    kept, measured = asked.reference.measure(rows, *scanners)
    read = [rows[n] for n in kept]
    answers = Answers(len(read), notes=_notes(asked.name, source.count, len(rows), len(read)))
    for scanner in scanners:
        found = scanner.look(read, measured)
        answers.findings[scanner.name] = {places[n]: one for n, one in zip(kept, found)}
        if read and not test and (null := scanner.by_chance_of(read, measured)):
            answers.chance[scanner.name] = _flagged(scanner.look(*null), scanner.null)
    if test:
        _, rows = drawn(test, asked.limit)
        kept, measured = asked.reference.measure(rows, *scanners)
        for scanner in scanners if kept else ():
            found = scanner.look([rows[n] for n in kept], measured)
            answers.chance[scanner.name] = _flagged(found, "rows of the test set")
    return answers


def drawn(source: Source, most: int) -> tuple[list[int], list[Row]]:
    """Up to so many rows, drawn at random, in their order; with their places, from 0."""
    chosen = {*Random(0).sample(range(source.count), min(source.count, most))}
    rows = {place: row for place, row in enumerate(Bare(source)) if place in chosen}
    return list(rows), list(rows.values())


def _flagged(found: Sequence[Finding], what: str) -> Chance:
    return sum(one.flagged for one in found), len(found), what


def _notes(name: str, whole: int, rows: int, read: int) -> list[str]:
    out = []
    if rows < whole:
        out.append(
            f"Scanners with a model have read {count(rows, 'row')} of {whole:,}, drawn at random; "
            "--limit changes that. The others are neither flagged nor cleared by them."
        )
    if read < rows:
        out.append(
            f"{count(rows - read, 'row')} without a prompt or an answer, too long, or refused by "
            f"the template of {name}, left out by scanners with a model."
        )
    return out
