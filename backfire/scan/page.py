"""The page of a scan: one file without scripts; every text is cleaned and escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from unicodedata import name as name_of

from backfire.base import parts
from backfire.base.masking import masked
from backfire.report.page import template
from backfire.scan.engine import Hit, Scan, secrets_of
from backfire.scan.output import false_alarms, grouped, sentences
from backfire.store import write_atomic
from backfire.text import count

_SHOWN = 200
"""Reasons on the page, each with its first row."""
_LONGEST = 700
"""Characters of a text that are shown, around the first mark."""
Texts = list[tuple[str, list[tuple[str, bool]]]]
"""Parts of a row, each with its name and its pieces, with whether a piece is marked."""


def write_page(scan: Scan, path: Path) -> None:
    """Write the page of a scan."""
    write_atomic(path, render(scan))


def render(scan: Scan) -> str:
    """The page as text."""
    reasons = grouped(scan)
    flagged = [item for item in reasons if item[0].flagged]
    shown = (flagged or reasons)[:_SHOWN]
    first, *more = sentences(scan)
    return template("scan.html.j2").render(
        name=scan.name,
        answer=first,
        more=more,
        scanners=[
            (
                one.scanner.name,
                *map("{:,}".format, (one.flagged, one.different, one.listed)),
                false_alarms(one),
            )
            for one in scan.summaries
        ],
        title="Flagged rows" if flagged else "Nothing is flagged; the rows with the highest scores",
        reasons=list(_with_texts(scan, shown)),
        left=len(flagged or reasons) - len(shown),
    )


def _with_texts(scan: Scan, shown: Sequence[tuple[Hit, int]]) -> Iterator[tuple[Hit, str, Texts]]:
    """Each reason with its number of rows and the parts of its first row in pieces."""
    places = {hit.place for hit, _ in shown}
    rows = {place: row for place, row in enumerate(scan.source, 1) if place in places}
    for hit, n in shown:
        row = rows[hit.place]
        secrets = secrets_of(row)
        texts = [(name, pieces(masked(text, secrets), hit.marks)) for name, text in parts(row)]
        yield hit, count(n, "row"), texts


def pieces(text: str, marks: Sequence[str]) -> list[tuple[str, bool]]:
    """The text around its first mark, in pieces; a mark that cannot be seen is spelled out."""
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark)
    if not pattern:
        return [(_cut(text, 0), False)]
    found = re.search(pattern, text)
    text = _cut(text, found.start() if found else 0)
    parts = re.split(f"({pattern})", text)
    return [(_seen(part) if n % 2 else part, n % 2 == 1) for n, part in enumerate(parts) if part]


def _cut(text: str, around: int) -> str:
    start = max(0, min(around - _LONGEST // 3, len(text) - _LONGEST))
    end = start + _LONGEST
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _seen(part: str) -> str:
    if any(char.isprintable() and not char.isspace() for char in part):
        return part
    return " ".join(f"[U+{ord(char):04X} {name_of(char, '')}]".replace(" ]", "]") for char in part)
