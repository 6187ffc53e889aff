"""Ends a command with one sentence on stderr and exit code 2."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any, NoReturn, cast

from backfire.errors import EXIT_CLASSES, exit_class, shortened
from backfire.text import clean, without_secrets

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""


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
        if message := _plain(error.format_message()):
            fail(f"{message} {setting}".strip())
        sys.exit(2)  # no command was given: the help was printed
    raise error


_VALUE = r"Invalid value for '([^']+)': "
_PLAIN = {
    rf"{_VALUE}Input should be greater than or equal to (\S+)": r"\1 must be \2 or more",
    rf"{_VALUE}Input should be less than or equal to (\S+)": r"\1 must be \2 or less",
    rf"{_VALUE}Input should be a valid integer.*": r"\1 must be a whole number",
    rf"{_VALUE}Input should be a valid number.*": r"\1 must be a number",
    rf"{_VALUE}Value error, (.*)": r"\1: \2",
    r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)": r"Too many arguments: \1",
}
"""Sentences of the command-line parser -> ours."""


def _plain(message: str) -> str:
    """A sentence of the parser in plain words."""
    for words, ours in _PLAIN.items():
        message = re.sub(words, ours, message.rstrip("."), flags=re.DOTALL)
    return f"{message}{'' if message.endswith('?') else '.'}" if message else ""


def _as_edit(error: Any) -> str:
    """Advice for an unknown option that is a setting of the recipe."""
    from backfire.other_names import as_edit

    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    takes_edits = context and any(param.name == "edits" for param in context.command.params)
    return as_edit(option.lstrip("-")) if option and takes_edits else ""


def fail(sentence: str, code: int = 2) -> NoReturn:
    note(sentence)
    sys.exit(code)


def interrupted(sentence: str = "Interrupted. Finished work is kept") -> NoReturn:
    """End after Ctrl-C, or after a signal to stop, with the command that continues."""
    command = without_secrets(shlex.join(["backfire", *sys.argv[1:]]))
    fail(f"{sentence}; to continue: {command}", INTERRUPTED)


def note(sentence: str) -> None:
    """Print a sentence on stderr."""
    print(f"backfire: {clean(shortened(sentence, 1000))}", file=sys.stderr)  # noqa: T201
