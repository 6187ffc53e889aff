"""Ends a command with one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from typing import Any, NoReturn, cast

from backfire.errors import EXIT_CLASSES, exit_class, shortened
from backfire.text import clean


def fail_or_raise(error: Exception) -> None:
    """End with one sentence for an error of the system or the user; re-raise a bug."""
    kind, sentence = exit_class(error)
    if kind in ("disk-full", "oom", "io"):
        fail(f"{sentence} {EXIT_CLASSES[kind]}")
    if isinstance(error, OSError):
        where = f" ({shortened(error.filename)})" if error.filename else ""
        fail(f"{error.strerror or error}{where}.")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's
        fail("A path begins with ~ and the name of an unknown user.")
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        if setting := _as_edit(error):
            cast(Any, error).possibilities = []  # options that only look alike
        if message := error.format_message():
            fail(f"{message.rstrip('.')}. {setting}" if setting else message)
        sys.exit(2)  # no command was given: the help was printed
    raise error


def _as_edit(error: Any) -> str:
    """Advice for an unknown option that is a setting of the recipe."""
    from backfire.other_names import as_edit

    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    takes_edits = context and any(param.name == "edits" for param in context.command.params)
    return as_edit(option.lstrip("-")) if option and takes_edits else ""


def fail(sentence: str) -> NoReturn:
    note(sentence)
    sys.exit(2)


def note(sentence: str) -> None:
    """Print a sentence on stderr."""
    print(f"backfire: {clean(shortened(sentence, 1000))}", file=sys.stderr)  # noqa: T201
