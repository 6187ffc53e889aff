"""Reads JSON values with their line numbers; stricter than `json`."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

Reject = Callable[[int, str], None]


class UnreadableError(Exception):
    """The file cannot be read from this line on. Were that one bad row, the rows that follow would
    be lost without being counted."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


DATA_KEYS = (
    "data", "rows", "examples", "instances", "records", "items", "samples", "entries", "dataset",
    "questions", "train", "test", "validation", "valid", "val", "dev",
)  # fmt: skip
"""Keys under which an object may hold the rows of a data set."""


class Decoder(json.JSONDecoder):
    """Records duplicate keys, of which `json` silently keeps the last."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeated: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated += [key for key in value if counts[key] > 1]
        return value

    def problem(self, value: Any, escapes: bool) -> str:
        """Why the value decoded last cannot be used, or an empty text."""
        keys, self.repeated = self.repeated, []
        if keys:
            return f"duplicate key '{keys[0]}'"
        # Strict UTF-8 admits no invalid text, so only an escape such as \ud800 can add it.
        return unusable(strings(value)) if escapes else ""


def values_by_line(lines: Iterable[bytes], reject: Reject) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON lines; blank lines are skipped."""
    decoder = Decoder()
    for line, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            # Records may end with a comma, as in a list.
            value = decoder.decode(raw.decode().rstrip().removesuffix(","))
        except (ValueError, RecursionError) as error:
            decoder.repeated.clear()
            reject(line, _reason(error, " (one record a line; over several, name it .json)"))
            continue
        if problem := decoder.problem(value, b"\\u" in raw):
            reject(line, problem)
        else:
            yield line, value


def values(lines: Iterable[bytes], reject: Reject) -> Iterator[tuple[int, Any]]:
    """(line, value) of a JSON document: a list, one inside an object, or misnamed JSON lines.

    Raises:
        UnreadableError: it is not valid, so that the beginning of the next value is unknown.
    """
    raw = b"".join(lines)
    first, _, rest = raw.strip().partition(b"\n")
    if rest and _is_object(first):
        yield from values_by_line(io.BytesIO(raw), reject)
        return
    line, at = 1, 0
    try:
        text, decoder = raw.decode(), Decoder()
        escapes = "\\u" in text
        for start, value in _document(text, decoder):
            line, at = line + text.count("\n", at, start), start
            if problem := decoder.problem(value, escapes):
                reject(line, problem)
            else:
                yield line, value
    except UnicodeDecodeError as error:
        place = raw.count(b"\n", 0, error.start) + 1
        raise UnreadableError(place, _reason(error)) from None
    except (ValueError, RecursionError) as error:
        raise UnreadableError(getattr(error, "lineno", line), _reason(error)) from None


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def _document(text: str, decoder: Decoder) -> Iterator[tuple[int, Any]]:
    """(position, value) of each record."""
    at = _skip(text, 0)
    if at == len(text):
        return
    if text[at] == "[":
        end = yield from _elements(text, at, decoder)
        _expect_end(text, end)
        return
    value, end = decoder.raw_decode(text, at)
    if isinstance(value, dict) and text[_skip(text, end) :][:1] == "{":
        yield from _concatenated(text, at, decoder)
        return
    _expect_end(text, end)
    repeated = bool(decoder.repeated)
    if isinstance(value, dict) and not repeated and (table := from_table(value)) is not None:
        yield from ((at, record) for record in table)
        return
    wraps = isinstance(value, dict) and any(isinstance(value.get(key), list) for key in DATA_KEYS)
    if not wraps:
        yield at, value
        return
    members = list(_members(text, at, decoder))
    decoder.repeated.clear()  # duplicates inside the rows are found again, row by row
    lists = [(key, place) for key, place in members if key in DATA_KEYS and text[place] == "["]
    if len(lists) > 1:
        keys = ", ".join(dict.fromkeys(key for key, _ in lists))
        raise ValueError(f"it holds several lists of rows ({keys}); write each to its own file")
    if len({key for key, _ in members}) < len(members) or not lists:
        raise ValueError(f"it must hold one list of rows under one of: {', '.join(DATA_KEYS)}")
    for place, record in _elements(text, lists[0][1], decoder):
        yield place, _unwrapped(record)


def _concatenated(text: str, at: int, decoder: Decoder) -> Iterator[tuple[int, Any]]:
    """(position, value) of values without a separator between them."""
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)


def from_table(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The records of an object that is a table in a layout of pandas or datasets, or None.

    Raises:
        ValueError: rows and columns are ambiguous, or of unequal length.
    """
    inner = list(value.values())
    if isinstance(names := value.get("columns"), list) and isinstance(value.get("data"), list):
        rows = value["data"]
        if any(not isinstance(row, list) or len(row) != len(names) for row in rows):
            raise ValueError("not every row of 'data' has as many cells as there are 'columns'")
        return [dict(zip(map(str, names), row, strict=True)) for row in rows]
    if len(inner) > 0 and all(isinstance(part, dict) and part for part in inner):
        keys = list(inner[0])
        numbered = [all(key.isdigit() for key in side) for side in (value, keys)]
        if all(numbered):
            raise ValueError("its columns have numbers for names; rows and columns look alike")
        if numbered[0] or (len(inner) > 1 and not numbered[1] and _alike(inner)):
            return [dict(part) for part in inner]  # row -> record
        if numbered[1] and _alike(inner):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    scalar = (str, int, float, type(None))
    if len(inner) > 1 and all(isinstance(part, list) and part for part in inner):
        lengths = {len(part) for part in inner}
        if len(lengths) == 1 and all(isinstance(cell, scalar) for part in inner for cell in part):
            return [dict(zip(value, cells, strict=True)) for cells in zip(*inner, strict=True)]
    return None


def _alike(parts: list[dict[str, Any]]) -> bool:
    return all(part.keys() == parts[0].keys() for part in parts)


def _unwrapped(record: Any) -> Any:
    """The row, without the row number that the hub's server adds."""
    is_wrapped = isinstance(record, dict) and {"row_idx", "row"} <= record.keys()
    return record["row"] if is_wrapped and isinstance(record["row"], dict) else record


def _expect_end(text: str, at: int) -> None:
    if _skip(text, at) < len(text):
        raise json.JSONDecodeError("Extra data", text, _skip(text, at))


def _elements(text: str, at: int, decoder: Decoder) -> Generator[tuple[int, Any], None, int]:
    """(position, value) of each element of the list that opens at `at`; returns its end."""
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        value, end = decoder.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)
        if text[at : at + 1] == "]":
            return at + 1
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _skip(text, at + 1)


def _members(text: str, at: int, decoder: Decoder) -> Iterator[tuple[str, int]]:
    """(key, position of its value) for the valid object that opens at `at`."""
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # past the colon
        yield key, at
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)


SPACE = re.compile(r"[ \t\n\r]*")


def _skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _reason(error: Exception, cut: str = "") -> str:
    """Why the text is not JSON; `cut` is added if it ends too early."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        hint = cut if error.pos >= len(error.doc.rstrip()) else ""
        around = error.doc[max(error.pos - 1, 0) : error.pos + 2]
        if any(sign in around for sign in ("//", "/*", "#")):
            hint = "; JSON has no comments, remove them"
        elif error.doc[error.pos : error.pos + 1] in ("]", "}"):
            hint = "; is there an extra comma before it?"
        return f"not valid JSON ({error.msg}, column {error.colno}){hint}"
    return str(error)


KINDS = {
    dict: "an object", list: "a list", str: "text", bool: "true or false",
    int: "a number", float: "a number", type(None): "nothing",
}  # fmt: skip


def kind_of(value: Any) -> str:
    """The type of a value, in words."""
    return KINDS.get(type(value), type(value).__name__)


def unusable(texts: Iterable[str]) -> str:
    """Why these texts cannot be used, or an empty text."""
    text = "".join(texts)
    if "\0" in text:
        return "it holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds text that is not UTF-8; save the file as UTF-8"
    return ""


def strings(value: Any) -> Iterator[str]:
    """Every string in a value, including keys."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
