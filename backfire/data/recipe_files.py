"""Files that a recipe names by `@PATH`: only from its own folder, recorded by their hash.

A recipe may come from an untrusted source. A file is read once, with the recipe; saved settings
hold the file's name and SHA-256 in place of its content.
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
_MAX_BYTES = 2**20
_HASH = "#sha256:"


class FileText(str):
    """Text read from a file; `source` is `@PATH#sha256:HASH`."""

    source: str = ""


class FileWords(tuple[str, ...]):
    """Words of such a text."""

    source: str = ""


@contextmanager
def recipe_folder(folder: Path | None) -> Iterator[None]:
    """Context in which `@PATH` is a file in this folder; with None no file is read."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def read_text(value: Any) -> Any:
    """The value, or the text of the file if the value is `@PATH`.

    A saved `@PATH#sha256:HASH` is not read outside a recipe's folder.

    Raises:
        UserError: the file is not in the recipe's folder, does not match the hash, or cannot be
            read.
    """
    if not isinstance(value, str) or isinstance(value, FileText) or not value.startswith("@"):
        return value
    path, _, expected = value[1:].partition(_HASH)
    folder = _folder.get()
    if folder is None and expected:
        return _from(FileText(value), value)
    content = _content(path, folder)
    actual = hashlib.sha256(content).hexdigest()
    if expected and actual != expected:
        raise UserError(f"'@{shortened(path)}' has changed: its SHA-256 is {actual} now.")
    try:
        return _from(FileText(content.decode("utf-8")), f"@{path}{_HASH}{actual}")
    except UnicodeDecodeError:
        raise UserError(f"'@{shortened(path)}' is not UTF-8 text.") from None


def as_words(text: str, words: Iterable[str]) -> tuple[str, ...]:
    """The words of a text, with the text's source if it has one."""
    source = text.source if isinstance(text, FileText) else ""
    return _from(FileWords(words), source) if source else tuple(words)


def written(value: Any) -> Any:
    """The saved form of a value: its source if it was read from a file, else the value."""
    return value.source if isinstance(value, FileText | FileWords) else value


def _from(value: Any, source: str) -> Any:
    value.source = source
    return value


def _content(path: str, folder: Path | None) -> bytes:
    name = f"'@{shortened(path)}'"
    if folder is None:
        raise UserError(
            f"{name}: files are read only from the folder of a recipe file, and there is none."
        )
    root = folder.resolve()
    try:
        file = (root / path).resolve()
        parts = file.relative_to(root).parts
    except (ValueError, OSError, RuntimeError):
        raise UserError(
            f"{name} is outside the recipe's folder, {root}; copy the file into it."
        ) from None
    if any(part.startswith(".") for part in parts):
        raise UserError(f"{name} is a hidden file; a recipe may not read those.")
    if not file.is_file():
        raise UserError(f"{name}: there is no such file in the recipe's folder, {root}.")
    with file.open("rb") as stream:
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise UserError(f"{name} is larger than 1 MB.")
    return content
