"""What a scan found as a table, as JSON, as CSV, and as sentences."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence

from backfire.evaluate.stats import wilson
from backfire.scan.engine import SAMPLE, Hit, Scan, Summary
from backfire.terminal import columns
from backfire.text import clean, count, csv_field, cut, line, number

FIELDS = ("id", "number", "score", "scanner", "reason", "flagged")
_SHOWN = 20
"""Reasons in the table, and those of one scanner."""
_OF_EACH = 5


def as_json(hits: Sequence[Hit]) -> str:
    """A list of objects, the highest score first."""
    records = [{name: _plain(getattr(hit, name)) for name in FIELDS} for hit in hits]
    return json.dumps(records, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def as_csv(hits: Sequence[Hit]) -> str:
    """One line for each hit, without spreadsheet formulas."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(FIELDS)
    rows.writerows([csv_field(getattr(hit, name)) for name in FIELDS] for hit in hits)
    return out.getvalue()


def _plain(value: object) -> object:
    return clean(value) if isinstance(value, str) else value


def as_table(scan: Scan) -> str:
    """The strongest reasons, each with its number of rows, and what each scanner found."""
    reasons = grouped(scan)
    flagged = [one for one in reasons if one[0].flagged]
    shown = _some(flagged or reasons)
    title = "Flagged, strongest first" if flagged else "Nothing is flagged; the highest scores"
    parts = []
    if shown:
        parts = [f"{title} (1 is the threshold):", columns(_HEAD, list(map(_cells, shown)))]
    if len(flagged) > len(shown):
        parts.append(f"{len(flagged) - len(shown):,} more reasons: --format csv, or --out.\n")
    return _joined([*parts, *_about(scan)])


def as_notes(scan: Scan, listed: int) -> str:
    """What the table says beside its reasons, for output that lists `listed` rows only."""
    whole = sum(one.listed for one in scan.summaries)
    left = [f"{listed:,} of {count(whole, 'finding')} are listed; --top changes that."]
    return _joined([*_about(scan), *left * (listed < whole)])


def _about(scan: Scan) -> list[str]:
    """What each scanner found, and the sentences."""
    scanners = columns(_OF_SCANNERS, [scanner_line(one) for one in scan.summaries])
    return [scanners, "\n".join(sentences(scan))]


def _joined(parts: Sequence[str]) -> str:
    return "\n".join(part.rstrip("\n") + "\n" for part in parts).rstrip("\n")


def _some(reasons: Sequence[tuple[Hit, int]]) -> list[tuple[Hit, int]]:
    """The first reasons of each scanner, in their order."""
    seen = Counter[str]()
    out: list[tuple[Hit, int]] = []
    for hit, n in reasons:
        seen[hit.scanner] += 1
        if seen[hit.scanner] <= _OF_EACH and len(out) < _SHOWN:
            out.append((hit, n))
    return out


def _cells(reason: tuple[Hit, int]) -> list[str]:
    hit, rows = reason
    where, why = cut(line(hit.id), 30), cut(line(hit.reason), 800)
    return [f"{hit.score:.2f}", hit.scanner, f"{rows:,}", where, why]


_HEAD = ("score", "scanner", "rows", "first row", "reason")
_OF_SCANNERS = ("scanner", "flagged", "of rows read", "reasons", "false alarms")


def grouped(scan: Scan) -> list[tuple[Hit, int]]:
    """The first hit of each reason, and how many rows have that reason."""
    first: dict[tuple[str, str], Hit] = {}
    for hit in scan.hits:
        first.setdefault((hit.scanner, hit.reason), hit)
    return [(hit, scan.rows_with[key]) for key, hit in first.items()]


def scanner_line(one: Summary) -> list[str]:
    total = number("share", one.flagged / max(one.rows, 1), digits=2)
    reasons = f"{one.different:,}"
    return [one.scanner.name, f"{one.flagged:,}", total, reasons, false_alarms(one)]


def false_alarms(one: Summary) -> str:
    """What the scanner flags where there should be nothing, with the end of its 95 % interval;
    if that is not known, the number of all flagged rows."""
    flagged, rows, what = one.chance or (one.flagged, one.rows, "")
    if not what:
        return f"unknown, at most {flagged:,} of {rows:,}" if flagged else "none, it flags nothing"
    most = number("share", wilson(flagged, rows)[1])
    return f"{flagged:,} of {rows:,}, a rate of at most {most} ({what})"


def sentences(scan: Scan) -> Iterator[str]:
    """What was scanned, what is flagged, and what cannot be seen."""
    source = scan.source
    yield f"{scan.name}: {count(source.count, 'row')}, {scan.num_flagged:,} flagged."
    yield from source.notes
    yield from scan.notes
    yield from scan.answers.facts(source.count)
    if source.count < 200:
        yield "With so few rows, only large effects can be told from chance."
    yield "No flag does not mean that the data is clean. What each scanner cannot see:"
    yield from (f"- {one.scanner.name}: {one.scanner.blind}." for one in scan.summaries)
    yield from _of_false_alarms(scan)


def _of_false_alarms(scan: Scan) -> Iterator[str]:
    """Which scanners have a rate of false alarms, and of what."""
    known = [one.scanner.name for one in scan.summaries if one.chance]
    others = [one.scanner for one in scan.summaries if not one.chance]
    seen = [one.name for one in others if one.in_text]
    ranked = [one.name for one in others if not one.in_text]
    if known and scan.has_test:
        yield (
            "False alarms are counted on rows of the test set, as if they were clean, in place of "
            f"as many rows of the file ({', '.join(known)})."
        )
        if scan.source.count > SAMPLE:
            yield (
                f"That was done in {SAMPLE:,} of the rows (fewer with a model); scanners that "
                "count flag more in more rows."
            )
    elif known:
        yield (
            f"False alarms by chance alone are estimated for {', '.join(known)}. That leaves out "
            "rows flagged for regularities of ordinary text, such as a word that fits one label."
        )
    if ranked:
        more = "" if scan.has_test else " Trusted rows of the same kind give a rate (--test)."
        yield (
            f"No rate of false alarms is known here for {', '.join(ranked)}: the file alone does "
            f"not say which of the rows that they flag are clean.{more}"
        )
    if seen:
        more = "" if scan.has_test else "; --test says how many trusted rows they flag"
        yield (
            f"Flags of {', '.join(seen)} can be checked by reading: what the reason names is in "
            f"the text. Chance has no part in them, so they have no rate{more}."
        )
