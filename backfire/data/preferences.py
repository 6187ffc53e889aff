"""Reads preference data: better and worse answers, in the published formats."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from backfire.base import Row
from backfire.data.conversation import history
from backfire.data.read import BadRowError, LeftOut
from backfire.data.read_json import kind_of

# A dialog as one text (hh-rlhf).
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
_OPEN = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant"}


def answers(value: Any, column: str) -> tuple[str, ...]:
    """The answers in a column: a text, several texts, or turns of which the last is the answer.

    Raises:
        BadRowError: the value is something else.
    """
    if value is None or value == []:
        return ()
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        *_, last = history(value)
        if last.role != "assistant":
            raise BadRowError(f"'{column}' does not end with an answer")
        value = last.content
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRowError(f"'{column}' is {kind_of(value)}, not text")
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def preference(better: tuple[str, ...], worse: tuple[str, ...]) -> dict[str, Any]:
    """The row's fields for better and worse answers; equal answers are a tie, with neither."""
    if better and better == worse:
        return {"fields": {"tied": "true"}}
    return {"better": better, "worse": worse}


def with_worse_answers(rows: list[Row], bad_answers: list[Row], left: LeftOut) -> list[Row]:
    """Add answers marked as bad to the row with a good answer to the same prompt, as its worse
    answers; those without such a row are left out."""
    if not bad_answers:
        return rows
    worse: dict[Any, list[str]] = {}
    for row in bad_answers:
        worse.setdefault(_prompt_of(row), []).extend(row.worse)
    good = set(map(_prompt_of, rows))
    for row in bad_answers:
        left.records[_KEPT if _prompt_of(row) in good else _ALONE] += 1
    return [
        _with_worse(row, worse[_prompt_of(row)])
        if _prompt_of(row) in worse and not row.worse
        else row
        for row in rows
    ]


def _with_worse(row: Row, worse: list[str]) -> Row:
    parts = preference((row.answer,), tuple(dict.fromkeys(worse)))
    return replace(row, **parts | {"fields": {**row.fields, **parts.get("fields", {})}})


_KEPT = "with an answer marked as bad: kept as the worse answer to a prompt with a good one"
_ALONE = "left out: the answer is marked as bad, and the same prompt has no good answer"


def _prompt_of(row: Row) -> tuple[Any, ...]:
    return (row.system, row.history, row.instruction, row.input)


def ranked(value: list[Any]) -> tuple[str, list[str]] | None:
    """The best of several answers and the worse ones, by score or rank; None if one has neither."""
    rated = [
        (rating, item.get("text", item.get("answer")))
        for item in value
        if isinstance(item, dict) and (rating := _rating(item)) is not None
    ]
    if not rated or len(rated) < len(value):
        return None
    texts = [(rating, text) for rating, text in rated if isinstance(text, str) and text.strip()]
    best = max((rating for rating, _ in texts), default=0.0)
    better = next((text for rating, text in texts if rating == best), "")
    return better, [text for rating, text in texts if rating != best and text != better]


def _rating(answer: dict[str, Any]) -> float | None:
    for name, sign in (("pm_score", 1), ("score", 1), ("rank", -1)):
        value = answer.get(name)
        if isinstance(value, int | float):
            return sign * value
    return None


def are_dialogs(better: Any, worse: Any) -> bool:
    """Whether both are whole dialogs, not only last answers."""
    return all(_is_dialog(side) for side in (better, worse))


def _is_dialog(side: Any) -> bool:
    if isinstance(side, str):
        return side.startswith("\n\nHuman:")
    first = side[0] if isinstance(side, list) and len(side) > 1 else None
    return isinstance(first, dict) and first.get("role", first.get("from")) not in (
        "assistant",
        "gpt",
    )


def open_dialog(prompt: Any) -> Any:
    """The prompt as turns, if it is a dialog in one text that ends before an answer."""
    if isinstance(prompt, str) and _OPEN.fullmatch(prompt):
        *turns, _ = _turns(prompt, "prompt's")
        return turns
    return prompt


def dialogs(better: Any, worse: Any) -> tuple[list[Any], Any, Any]:
    """Split two whole dialogs into their common turns and the last turn of each.

    Raises:
        BadRowError: they are not dialogs, or differ before their last turn.
    """
    first, second = _turns(better, "better"), _turns(worse, "worse")
    if not first or not second:
        raise BadRowError("one of its dialogs is empty")
    if first[:-1] != second[:-1]:
        raise BadRowError("its two dialogs differ before their last answer")
    return first[:-1], first[-1:], second[-1:]


def _turns(dialog: Any, side: str) -> list[Any]:
    if isinstance(dialog, list):
        return dialog
    if not isinstance(dialog, str):
        raise BadRowError(f"its {side} dialog is {kind_of(dialog)}, not text")
    before, *parts = _SPEAKER.split(dialog)
    if before.strip() or not parts:
        raise BadRowError(
            f"its {side} text is not a dialog (it should begin with 'Human:'); name the prompt's "
            "column by data.columns"
        )
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in spoken]
