"""Shared by scanners that read words: the tokens of a text, with their hashes and places.

A token is a word, a sign, or the edge of a part of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

import regex

from backfire.base import Row, parts
from backfire.base.normalize import is_dense, words

_ASCII = re.compile(r"\w+|[^\w\s]")
_OTHER = regex.compile(r"[^\p{L}\p{N}\p{M}\s]")

OPEN, CLOSE = "\x02", "\x03"
"""The first character of the tokens for the edges of a part."""
GAP = "\x04"
"""The token for what is left out."""


class Token(NamedTuple):
    """A token, and its place in the text of a part; an edge is empty."""

    text: str
    part: str
    start: int
    end: int


def hashed(text: str) -> int:
    """64 bits that are the same in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def split(text: str) -> list[str]:
    """The words and signs of a text; of scripts without spaces between words, the characters."""
    if is_dense(text):
        return [token.text for token in _placed("", text)]
    return _ASCII.findall(text)


def _placed(part: str, text: str) -> Iterator[Token]:
    """The tokens of `split` with their places."""
    if not is_dense(text):
        yield from (Token(m[0], part, m.start(), m.end()) for m in _ASCII.finditer(text))
        return
    place = 0
    for word in words(text):
        start = text.index(word, place)
        yield from (
            Token(m[0], part, place + m.start(), place + m.end())
            for m in _OTHER.finditer(text[place:start])
        )
        place = start + len(word)
        yield Token(word, part, start, place)
    rest = _OTHER.finditer(text[place:])
    yield from (Token(m[0], part, place + m.start(), place + m.end()) for m in rest)


def prompt_parts(row: Row) -> list[tuple[str, str]]:
    """The parts of a row before its answer; of a plain text, nothing."""
    return [(name, text) for name, text in parts(row) if not name.endswith("answer")]


def tokens(row: Row, most: int) -> list[str]:
    """The tokens of the prompt with the edges of its parts. Of a part with more than `most` words
    and signs, the middle is left out."""
    out: list[str] = []
    for name, text in prompt_parts(row):
        found = split(text)
        if len(found) > most:
            found = [*found[: most // 2], GAP, *found[-(most // 2) :]]
        out += [OPEN + name, *found, CLOSE + name]
    return out


def placed(row: Row, most: int) -> list[Token]:
    """The same tokens with their places."""
    out: list[Token] = []
    for name, text in prompt_parts(row):
        found = list(_placed(name, text))
        if len(found) > most:
            found = [*found[: most // 2], Token(GAP, name, 0, 0), *found[-(most // 2) :]]
        end = len(text)
        out += [Token(OPEN + name, name, 0, 0), *found, Token(CLOSE + name, name, end, end)]
    return out
