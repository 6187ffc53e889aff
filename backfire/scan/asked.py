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
TEST_ROWS = "rows of the test set among those of the file"


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
    counted on test rows among the others if there are any, else on measurements without what is
    looked for."""
    places, rows = drawn(source, asked.limit)
    kept, measured = asked.reference.measure(rows, *scanners)
    read = [rows[n] for n in kept]
    answers = Answers(len(read), notes=_notes(asked.name, source.count, len(rows), len(read)))
    for scanner in scanners:
        found = scanner.look(read, measured)
        answers.findings[scanner.name] = {places[n]: one for n, one in zip(kept, found)}
        if read and not test and (null := scanner.by_chance_of(read, measured)):
            answers.chance[scanner.name] = flagged(scanner.look(*null), scanner.null)
    if test:
        rows, trusted = among(source, test, asked.limit)
        kept, measured = asked.reference.measure(rows, *scanners)
        for scanner in scanners if kept else ():
            found = scanner.look([rows[n] for n in kept], measured)
            clean = [one for n, one in zip(kept, found, strict=True) if n in trusted]
            answers.chance[scanner.name] = flagged(clean, TEST_ROWS)
    return answers


def drawn(source: Source, most: int) -> tuple[list[int], list[Row]]:
    """Up to so many rows, drawn at random, in their order; with their places, from 0."""
    chosen = {*Random(0).sample(range(source.count), min(source.count, most))}
    rows = {place: row for place, row in enumerate(Bare(source)) if place in chosen}
    return list(rows), list(rows.values())


def among(source: Source, test: Source, most: int) -> tuple[list[Row], frozenset[int]]:
    """Up to so many rows of the source, in which up to half are replaced by rows of the test set,
    both drawn at random; and the places of those.

    What a scanner flags depends on the number of rows, since many count how often something occurs.
    So test rows are not scanned alone, but in a file as large as the one in question.
    """
    rows = drawn(source, most)[1]
    others = drawn(test, len(rows) // 2)[1]
    places = sorted(Random(1).sample(range(len(rows)), len(others)))
    for place, row in zip(places, others, strict=True):
        rows[place] = row
    return rows, frozenset(places)


def flagged(found: Sequence[Finding], what: str) -> Chance:
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
