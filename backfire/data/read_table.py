"""Reads CSV and TSV records with their line numbers."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Literal

from backfire.data.columns import NAMES, fold, listed
from backfire.data.read_json import Reject, UnreadableError, unusable

# A widely used data set without a header and in another encoding.
SENTIMENT140 = ("target", "ids", "date", "flag", "user", "text")
SENTIMENT140_LINE = re.compile(rb'"?[024]"?,"?\d+"?,"?[A-Z][a-z]{2} [A-Z][a-z]{2} \d\d ')
_SAMPLE_LINES = 50
_LONGEST_CELL = 2**24
"""In characters; the csv module's default limit is shorter than a long article."""


def table_rows(
    lines: Iterator[bytes], reject: Reject, *, tabs: bool, header: bool
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, record) for each row of a CSV or, with `tabs`, a TSV file.

    The delimiter may be another common one than the file name says. With `header=False` columns are
    named "0", "1", ...; a header of names is then skipped, a header of numbers is used.

    Raises:
        UnreadableError: the header cannot be used, or a quote is left open.
    """
    csv.field_size_limit(_LONGEST_CELL)
    sample = list(islice(lines, _SAMPLE_LINES))
    tweets = not tabs and bool(sample) and SENTIMENT140_LINE.match(sample[0]) is not None
    encoding = "latin-1" if tweets else "utf-8"
    delimiter = _delimiter(sample, "\t" if tabs else ",", header)
    tabs = tabs and delimiter == "\t"
    # Bytes that are not UTF-8 become surrogates, which are rejected row by row.
    text = (raw.decode(encoding, "surrogateescape") for raw in chain(sample, lines))
    # In TSV a quote is an ordinary character (GLUE), so it cannot swallow the next rows.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=not tweets)
    names = list(SENTIMENT140) if tweets and header else None
    for line, cells in _cells(reader, reject):
        if names is None:
            names, problem = _header(cells, header)
            if problem:
                raise UnreadableError(line, f"the header: {problem}")
            if header or _is_header(cells):
                continue
        if len(cells) != len(names):
            reject(line, f"{len(cells)} cells instead of {len(names)}")
            continue
        record = dict(zip(names, map(_unquoted, cells) if tabs else cells, strict=True))
        problem = unusable(record.values())
        if problem:
            reject(line, problem)
        else:
            yield line, record


def _header(cells: list[str], header: bool) -> tuple[list[str], str]:
    """The column names by the first row, and what is wrong with it, or an empty text."""
    places = list(map(str, range(len(cells))))
    if not (header or _is_numbered(cells)):
        return places, ""
    names = [name.strip() or places[place] for place, name in enumerate(cells)]
    if not cells[0].strip() and len(cells) > 1:
        names[0] = "index"  # as pandas writes it
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        return names, f"duplicate column '{listed(twice[:1])}'"
    return names, unusable(names)


def _is_header(cells: list[str]) -> bool:
    """Whether the first row is a header, although the table is declared to have none."""
    num_names = sum(fold(cell) in NAMES for cell in cells)
    short = all(len(cell.split()) < 5 for cell in cells) and len(set(cells)) == len(cells)
    return _is_numbered(cells) or (short and num_names >= min(2, len(cells)))


def _is_numbered(cells: list[str]) -> bool:
    """Whether this is pandas' header 0, 1, ... for columns without names."""
    named = cells if cells[0].strip() else cells[1:]
    return bool(named) and named == [str(place) for place in range(len(named))]


def _delimiter(sample: list[bytes], usual: str, header: bool) -> str:
    """The usual delimiter, unless it does not split the first line and another one splits all lines
    into equally many cells.

    If there is a header, it alone decides; a line of data may contain any of the characters.
    """
    text = [raw.decode("utf-8", "replace") for raw in (sample[:1] if header else sample)]
    if _width(text[:1], usual) == 1:
        for sign in ",;\t|":
            if _width(text, sign) > 1 and (header or len(text) > 1):
                return sign
    return usual


def _width(lines: list[str], delimiter: str) -> int:
    """Number of cells in each line; 0 if the lines differ or cannot be split."""
    try:
        # A quote that the last line leaves open may be closed in later lines.
        rows = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error:
        return 0
    widths = {len(row) for row in (rows[:-1] if len(lines) == _SAMPLE_LINES else rows) if row}
    return widths.pop() if len(widths) == 1 else 0


def _cells(reader: Any, reject: Reject) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv reader, each with its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_open = "limit" in str(error) or "end" in str(error)
            hint = "; is a quote left open?" if is_open else ""
            last = reader.line_num
            some = f", lines {line} to {last}" if last > line else ""
            reason = f"not a valid table row ({error}{hint}{some})"
            if is_open and (last > line or "end of data" in str(error)):
                raise UnreadableError(line, reason) from None
            reject(line, reason)
            continue
        if cells:
            yield line, cells


def _unquoted(cell: str) -> str:
    """A TSV cell without its quotes, if it was quoted because it holds (doubled) quotes."""
    inner = cell[1:-1]
    quoted = len(cell) > 2 and cell[0] == cell[-1] == '"' and '""' in inner
    return inner.replace('""', '"') if quoted and '"' not in inner.replace('""', "") else cell
