"""Texts of `--help` are shown as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text
from typer.main import get_command

from backfire.cli import app
from tests.helpers.command_line import Run


def _texts(command: Any) -> Iterator[str]:
    yield command.help or ""
    yield from (getattr(param, "help", None) or "" for param in command.params)
    for other in getattr(command, "commands", {}).values():
        yield from _texts(other)


def test_brackets_are_escaped_in_every_help_text() -> None:
    """Rich takes [words] for markup and leaves them out."""
    texts = [*_texts(get_command(app))]
    assert len(texts) > 100
    lost = [text for text in texts if Text.from_markup(text).plain != text.replace("\\[", "[")]
    assert lost == []


def test_the_example_of_an_edit_is_whole(backfire: Run) -> None:
    assert "data.labels=[no, yes]" in " ".join(backfire("scan", "--help").out.split())
