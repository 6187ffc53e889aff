"""Files that a recipe names by `@PATH`: only those in its own folder, recorded by their hash.

A recipe may come from anybody. What a file says is read once, when the recipe is; where settings
are written down, the file's name and SHA-256 are there in place of its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from backfire.errors import UserError, shortened

_folder: ContextVar[Path | None] = ContextVar("folder of the recipe", default=None)
_MOST_BYTES = 2**20
_HASH = "#sha256:"


class FileText(str):
    """A text that was read from a file; `source` says which, as `@PATH#sha256:HASH`."""

    source: str = ""


class FileWords(tuple[str, ...]):
    """The lines of such a text."""

    source: str = ""


@contextmanager
def beside(folder: Path | None) -> Iterator[None]:
    """Within it, `@PATH` is a file in this folder; None: no file is read."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def read_text(value: Any) -> Any:
    """The value itself, or, of `@PATH`, the text in that file.

    What is written down as `@PATH#sha256:HASH` is left unread where there is no recipe beside it.

    Raises:
        UserError: the file is not in the recipe's folder, is another one than the hash says, or
            cannot be read.
    """
    if not isinstance(value, str) or isinstance(value, FileText) or not value.startswith("@"):
        return value
    path, _, expected = value[1:].partition(_HASH)
    folder = _folder.get()
    if folder is None and expected:
        return _from(FileText(value), value)
    content = _content(path, folder)
    found = hashlib.sha256(content).hexdigest()
    if expected and found != expected:
        raise UserError(f"'@{shortened(path)}' has changed: its SHA-256 is {found} now.")
    try:
        return _from(FileText(content.decode("utf-8")), f"@{path}{_HASH}{found}")
    except UnicodeDecodeError:
        raise UserError(f"'@{shortened(path)}' is not UTF-8 text.") from None


def as_words(text: str, words: Iterable[str]) -> tuple[str, ...]:
    """The words that were found in a text, which keep its source if it has one."""
    source = text.source if isinstance(text, FileText) else ""
    return _from(FileWords(words), source) if source else tuple(words)


def written(value: Any) -> Any:
    """How a value is written down: the source of what was read from a file, else the value."""
    return value.source if isinstance(value, FileText | FileWords) else value


def _from(value: Any, source: str) -> Any:
    value.source = source
    return value


def _content(path: str, folder: Path | None) -> bytes:
    said = f"'@{shortened(path)}'"
    if folder is None:
        raise UserError(
            f"{said}: a file is read only from the folder of a recipe file; here is none."
        )
    root = folder.resolve()
    try:
        file = (root / path).resolve()
        parts = file.relative_to(root).parts
    except (ValueError, OSError, RuntimeError):
        raise UserError(
            f"{said} is outside the recipe's folder, {root}; copy the file into it."
        ) from None
    if any(part.startswith(".") for part in parts):
        raise UserError(f"{said} is a hidden file; a recipe may not read those.")
    if not file.is_file():
        raise UserError(f"{said}: there is no such file in the recipe's folder, {root}.")
    with file.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UserError(f"{said} is larger than 1 MB.")
    return content
