"""Files that a recipe names by `@PATH`: only from its own folder, recorded by their hash.

A recipe may come from an untrusted source. A file is read once, with the recipe; saved settings
hold the file's name and SHA-256 in place of its content. A run may be given away, and its workers
may see no folder of a recipe: they read the copy that is kept in the cache, for this user alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from backfire.errors import UserError, shortened
from backfire.store import cache_root, mark_recent, write_atomic

KEPT = "texts"
"""Subfolder of the cache: a file for each text and user."""
_folder: ContextVar[Path | None] = ContextVar("folder of the recipe", default=None)
_MAX_BYTES = 2**20
_HASH = "#sha256:"
_SAVED = re.compile(rf"{_HASH}([0-9a-f]{{64}})")
_contents: dict[str, bytes] = {}
"""SHA-256 -> content of the files that this process has read."""


class FileText(str):
    """Text read from a file; `source` is `@PATH#sha256:HASH`."""

    source: str = ""
    is_read: bool = True
    """False for a saved text that is not to be found: it is only its source."""


class FileWords(tuple[str, ...]):
    """Words of such a text."""

    source: str = ""
    is_read: bool = True


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

    Outside a recipe's folder a saved `@PATH#sha256:HASH` is read from the cache. If it is not
    there, it stays unread, since a finished cell needs no text (see `refuse_unread`).

    Raises:
        UserError: the file is not in the recipe's folder, does not match the hash, or cannot be
            read.
    """
    if not isinstance(value, str) or isinstance(value, FileText) or not value.startswith("@"):
        return value
    path, _, expected = value[1:].partition(_HASH)
    folder = _folder.get()
    kept = _kept(expected) if folder is None and expected else None
    if folder is None and expected and kept is None:
        return _from(FileText(value), value, is_read=False)
    content = _content(path, folder) if kept is None else kept
    actual = hashlib.sha256(content).hexdigest()
    if expected and actual != expected:
        raise UserError(f"'@{shortened(path)}' has changed: its SHA-256 is {actual} now.")
    _contents[actual] = content
    try:
        return _from(FileText(content.decode("utf-8")), f"@{path}{_HASH}{actual}")
    except UnicodeDecodeError:
        raise UserError(f"'@{shortened(path)}' is not UTF-8 text.") from None


def as_words(text: Any, words: Iterable[str]) -> tuple[str, ...]:
    """The words of a text, with the text's source if it has one."""
    if isinstance(text, FileText) or not is_read(text):
        found: FileWords = _from(FileWords(words), text.source, is_read=text.is_read)
        return found
    return tuple(words)


def written(value: Any) -> Any:
    """The saved form of a value: its source if it was read from a file, else the value."""
    return value.source if isinstance(value, FileText | FileWords) else value


def is_read(value: Any) -> bool:
    return not isinstance(value, FileText | FileWords) or value.is_read


def refuse_unread(*values: Any) -> None:
    """Refuse to use a saved text that was not read.

    Raises:
        UserError: one of the values is such a text.
    """
    if lost := next((value for value in values if not is_read(value)), None):
        path = lost.source.partition(_HASH)[0]
        raise UserError(
            f"The text of '{shortened(path)}' is not in the cache {cache_root()}; plan or run the "
            "recipe again beside its file."
        )


def keep(settings: str) -> None:
    """Keep the files that saved settings name in the cache, readable for this user alone. (If it
    cannot be written, whoever needs one says so.)"""
    for found in _contents.keys() & set(_SAVED.findall(settings)):
        file = cache_root() / KEPT / f"{found}-{os.getuid()}"
        with suppress(OSError):
            if file.is_file():
                mark_recent(file)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, _contents[found], mode=0o600)


def _kept(expected: str) -> bytes | None:
    """The content with this SHA-256, if a copy of it can be read."""
    if not _SAVED.fullmatch(f"{_HASH}{expected}"):
        return None
    for file in sorted((cache_root() / KEPT).glob(f"{expected}-*")):
        with suppress(OSError):
            if hashlib.sha256(content := file.read_bytes()).hexdigest() == expected:
                return content
    return None


def _from(value: Any, source: str, *, is_read: bool = True) -> Any:
    value.source, value.is_read = source, is_read
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
