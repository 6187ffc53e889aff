"""Runs scanners over rows, side by side, and ranks what they find."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from backfire import text
from backfire.base import NOTHING, Finding, ModelScanner, Row, Scanner, parts
from backfire.base.masking import Secret, masked, redacted, secrets_in
from backfire.errors import UserError
from backfire.scan.asked import TEST_ROWS, Answers, Asked, Chance, among, ask, drawn, flagged
from backfire.scan.source import Bare, Source

SAMPLE = 10_000
"""Rows on which false alarms are estimated."""
_MOST_LABELS = 100


@dataclass(frozen=True, slots=True)
class Hit:
    """A finding in a row, as it may be shown: secrets are masked."""

    id: str
    number: int
    """Place of the row in its file, from 1."""
    place: int
    """Place among the rows that were read, from 1."""
    score: float
    scanner: str
    reason: str
    flagged: bool
    marks: tuple[str, ...] = ()
    """Parts of the row's text to mark."""


@dataclass
class Summary:
    """What one scanner found."""

    scanner: Scanner
    rows: int
    """Number of rows that it read."""
    flagged: int = 0
    listed: int = 0
    """Rows with a score."""
    hits: list[Hit] = field(default_factory=list)
    """The rows with the highest scores."""
    chance: Chance | None = None
    """What it flags where there should be nothing; None if it has no such rate."""
    reasons: array[int] = field(default_factory=lambda: array("q"))
    """Hash of each reason, 8 bytes for each row with a score, until they are counted."""
    flags: array[int] = field(default_factory=lambda: array("q"))
    """The same of the flagged rows only."""
    different: int = 0
    """For how many different reasons rows are flagged."""


@dataclass
class Tally:
    """How often each answer occurs, as long as there are few."""

    counts: Counter[str] = field(default_factory=Counter)
    many: bool = False
    what: str = "label"
    """What these are: labels, if each row has some to choose from."""

    def add(self, row: Row) -> None:
        if not self.many:
            self.counts[redacted(row.answer).strip()[:80]] += 1
            self.many = len(self.counts) > _MOST_LABELS
            self.what = self.what if row.candidates else "answer"

    def facts(self, rows: int) -> list[str]:
        """These answers and their shares, and whether one has most rows or hardly any."""
        if self.many or not self.counts or rows < 5 * len(self.counts):
            return []
        ordered = self.counts.most_common()
        shares = [(text.line(label), text.number("share", n / rows)) for label, n in ordered[:10]]
        some = ", ".join(f"{label} {share}" for label, share in shares)
        more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
        out = [f"{self.what.title()}s: {some}{more}."]
        if ordered[0][1] >= 0.9 * rows:
            out.append(f"One {self.what} has at least 90 % of the rows.")
        if few := sum(n < 0.01 * rows for _, n in ordered):
            out.append(f"{text.count(few, self.what)} below 1 % of the rows.")
        return out


@dataclass
class Scan:
    """What all scanners found in the rows of a file."""

    name: str
    source: Source
    summaries: list[Summary]
    scores: array[float]
    """Highest score of each row: 4 bytes a row."""
    flags: bytearray
    """Whether each row is flagged."""
    has_test: bool
    answers: Tally
    notes: list[str] = field(default_factory=list)
    """Sentences about what was not read."""
    rows_with: dict[tuple[str, str], int] = field(default_factory=dict)
    """Scanner and reason of a hit -> how many rows have that reason."""

    @property
    def hits(self) -> list[Hit]:
        """The rows with the highest scores, of all scanners."""
        every = [hit for summary in self.summaries for hit in summary.hits]
        return sorted(every, key=lambda hit: (-hit.score, hit.place, hit.scanner))

    @property
    def num_flagged(self) -> int:
        return sum(self.flags)


def scan(
    name: str,
    source: Source,
    scanners: Sequence[Scanner],
    *,
    test: Source | None,
    top: int,
    asked: Asked | None = None,
) -> Scan:
    """Scan the rows; of each scanner, the `top` rows with the highest scores are kept. Scanners
    with a model need `asked`."""
    by_model = [one for one in scanners if isinstance(one, ModelScanner)]
    answers = ask(by_model, source, test, asked) if asked and by_model else Answers()
    summaries = [Summary(one, source.count) for one in scanners]
    found = Scan(name, source, summaries, array("f"), bytearray(), test is not None, Tally())
    found.notes += answers.notes
    for summary in summaries:
        if isinstance(summary.scanner, ModelScanner):
            summary.rows, summary.chance = answers.read, answers.chance.get(summary.scanner.name)
    streams = list(_streams(source, scanners, test, answers))
    heaps: list[list[tuple[float, int, Finding]]] = [[] for _ in scanners]
    worse = plain = 0
    for place, (row, *findings) in enumerate(zip(Bare(source), *streams, strict=True), 1):
        worse += any(text != row.answer for text in row.worse)
        plain += not row.conversation.strip()
        found.answers.add(row)
        found.scores.append(max((f.score for f in findings), default=0.0))
        found.flags.append(any(f.flagged for f in findings))
        for summary, heap, one in zip(summaries, heaps, findings, strict=True):
            summary.flagged += one.flagged
            if one.score > 0:
                summary.listed += 1
                summary.reasons.append(hash(one.reason))
                if one.flagged:
                    summary.flags.append(summary.reasons[-1])
                keep = heapq.heappush if len(heap) < top else heapq.heappushpop
                keep(heap, (one.score, -place, one))
    found.notes += _unread(scanners, worse, plain)
    _add_hits(found, heaps)
    _add_false_alarms(found, test)
    return found


def _unread(scanners: Sequence[Scanner], worse: int, plain: int) -> Iterator[str]:
    """What scanners do not read: answers marked as bad in `worse` rows, and `plain` rows, which
    have no prompt."""
    if worse and (names := [one.name for one in scanners if not one.reads_worse]):
        yield (
            f"Not read by {', '.join(names)}: answers marked as bad beside the one to learn "
            f"({text.count(worse, 'row')})."
        )
    if plain and (names := [one.name for one in scanners if one.needs_prompt]):
        rows = text.count(plain, "row")
        yield f"Not read by {', '.join(names)}: texts without a prompt ({rows})."


def _streams(
    source: Source, scanners: Sequence[Scanner], test: Source | None, answers: Answers
) -> Iterator[Iterator[Finding]]:
    """Each scanner's findings, one for each row."""
    for scanner in scanners:
        known = answers.findings.get(scanner.name)
        if known is None:
            yield scanner.scan(Bare(source), Bare(test or ()))
        else:
            yield map(partial(_known, known), range(source.count))


def _known(findings: Mapping[int, Finding], place: int) -> Finding:
    return findings.get(place, NOTHING)


def _add_hits(found: Scan, heaps: Sequence[list[tuple[float, int, Finding]]]) -> None:
    """Read the rows of the findings that are kept, and count those with the same reasons."""
    kept: dict[int, list[tuple[Summary, Finding]]] = {}
    for summary, heap in zip(found.summaries, heaps, strict=True):
        for _, place, one in heap:
            kept.setdefault(-place, []).append((summary, one))
    shown: dict[str, dict[int, str]] = {one.scanner.name: {} for one in found.summaries}
    for place, row in enumerate(found.source, 1):
        for summary, one in kept.get(place, ()):
            number, name = found.source.numbers[place - 1], summary.scanner.name
            summary.hits.append(_hit(number, place, row, one, name))
            shown[name][hash(one.reason)] = summary.hits[-1].reason
    for summary in found.summaries:
        summary.hits.sort(key=lambda hit: (-hit.score, hit.place))
        as_shown = shown[summary.scanner.name]
        counts = Counter(as_shown[one] for one in summary.reasons if one in as_shown)
        found.rows_with |= {(summary.scanner.name, one): n for one, n in counts.items()}
        summary.different = len(np.unique(np.array(summary.flags)))
        del summary.reasons[:], summary.flags[:]


def _hit(number: int, place: int, row: Row, finding: Finding, scanner: str) -> Hit:
    secrets = secrets_of(row)
    return Hit(
        id=masked(row.id, [secret for secret in secrets_in(row.id) if secret.is_key]),
        number=number,
        place=place,
        score=round(finding.score, 4),
        scanner=scanner,
        reason=masked(finding.reason, [*secrets, *secrets_in(finding.reason)]),
        flagged=finding.flagged,
        marks=tuple(masked(mark, secrets) for mark in finding.marks),
    )


def secrets_of(row: Row) -> list[Secret]:
    """What must not be shown of a row."""
    return [secret for _, part in parts(row) for secret in secrets_in(part)]


def _add_false_alarms(found: Scan, test: Source | None) -> None:
    """Count what each scanner flags in rows where there should be nothing: test rows among a sample
    of the others, or a sample of the rows with what the scanner looks for removed."""
    some = drawn(found.source, SAMPLE)[1] if test is None else []
    mixed, trusted = among(found.source, test, SAMPLE) if test else ([], frozenset())
    for summary in found.summaries:
        scanner = summary.scanner
        if isinstance(scanner, ModelScanner):
            continue  # `ask` has estimated them
        if trusted and not scanner.needs_test:
            findings = enumerate(scanner.scan(mixed))
            summary.chance = flagged([one for n, one in findings if n in trusted], TEST_ROWS)
        elif rows := scanner.by_chance(some):
            what = "the same rows with shuffled answers"
            summary.chance = flagged([*scanner.scan(rows)], what)


def removed(found: Scan, share: float | None) -> list[int]:
    """The places of the rows to remove, from 0: the flagged ones, or the `share` with the highest
    scores. Rows without a score are never removed.

    Raises:
        UserError: no row would be left, or none removed.
    """
    scores = np.frombuffer(found.scores, np.float32)
    if share is None:
        out = np.flatnonzero(np.frombuffer(found.flags, np.uint8))
    else:
        most = min(round(share * len(scores)), int((scores > 0).sum()))
        out = np.sort(np.argsort(-scores, kind="stable")[:most])
    if not len(out):
        what = (
            "no row is flagged" if share is None else "no row has a score, or it is less than one"
        )
        raise UserError(f"Nothing to remove: {what}; --write would copy the rows.")
    if len(out) == len(scores):
        raise UserError("All rows would be removed; choose fewer by --remove.")
    return list(map(int, out))
