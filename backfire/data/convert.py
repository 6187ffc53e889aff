"""Records to rows: everything becomes one internal form, once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

from backfire.base import Row
from backfire.base.text import folded
from backfire.data.compared import answers, dialogs, known
from backfire.data.conversation import conversation, history
from backfire.data.read import BadRowError, BadRows, Record
from backfire.data.read_json import kind_of
from backfire.data.shapes import Shape, Task, shape_of


def to_rows(
    records: Iterable[tuple[int, Record]],
    task: Task,
    bad: BadRows,
    *,
    file: str,
    stem: str,
    ids: set[str],
) -> list[Row]:
    """The records as rows; those that cannot be used go to `bad`.

    A row keeps its record's own id unless a row in `ids` has it already; else it is STEM-LINE.
    """
    rows: list[Row] = []
    shapes: dict[tuple[str, ...], Shape] = {}
    labeled = bool(task.labels)
    for line, record in records:
        names = tuple(record)
        try:
            shape = shapes.get(names) or shapes.setdefault(names, shape_of(names, task))
            if labeled and not {"label", "candidates"} & set(shape.columns):
                raise BadRowError("it has no label")
            name = _id(record, shape, f"{stem}-{line}", ids)
            rows.append(to_row(record, shape, name))
        except BadRowError as problem:
            bad.add(file, line, str(problem))
            continue
        labeled = labeled or ("label" in shape.columns and "answer" not in shape.columns)
        ids.add(name)
    return rows


def _id(record: Record, shape: Shape, place: str, ids: Collection[str]) -> str:
    own = plain(record.get(shape.columns.get("id", "")))
    if own and own not in ids:
        return own
    number, name = 1, place
    while name in ids:
        number, name = number + 1, f"{place}-{number + 1}"
    return name


def to_row(record: Record, shape: Shape, name: str) -> Row:
    """One record as a row with this id.

    Raises:
        BadRowError: the prompt, the answer or the label is missing, empty or not text.
    """
    columns = shape.columns
    if "better" in columns:
        parts = _compared(record, shape)
    elif "messages" in columns:
        if shape.instruction:
            raise BadRowError("an instruction cannot be put before a conversation")
        parts = conversation(record[columns["messages"]], _text(record, shape, "system"))
    elif "answer" in columns:
        parts = _answered(record, shape, record[columns["answer"]], record[columns["instruction"]])
    elif "label" in columns:
        parts = _labeled(record, shape)
    else:
        parts = {"instruction": shape.instruction, "answer": _text(record, shape, "text")}
    if not parts["answer"].strip():
        raise BadRowError("the answer is empty")
    fields = _fields(record, shape) | parts.pop("fields", {})
    return Row(id=name, fields=fields, **parts)


def _compared(record: Record, shape: Shape) -> dict[str, Any]:
    """The best of the better answers is the one to learn, unless a column of its own says it."""
    columns = shape.columns
    sides = [record[columns[side]] if side in columns else None for side in ("better", "worse")]
    if "instruction" in columns:
        prompt = record[columns["instruction"]]
    elif shape.instruction:
        raise BadRowError("an instruction cannot be put before a conversation")
    elif "messages" in columns:
        prompt = record[columns["messages"]]
        history(prompt)  # a list of turns, or no use
    else:
        prompt, *sides = dialogs(*sides)
    better, worse = (
        answers(sides[0], columns["better"]),
        answers(sides[1], columns.get("worse", "")),
    )
    answer = record[columns["answer"]] if "answer" in columns else "".join(better[:1])
    if better and answer and answer not in worse:
        better = tuple(dict.fromkeys((answer, *better)))  # the reference is the best of them
    parts = _answered(record, shape, answer, prompt) | known(better, worse)
    if "worse_input" in columns:
        own = {"worse_input": _text(record, shape, "worse_input")}
        parts["fields"] = own | parts.get("fields", {})
    return parts


def _answered(record: Record, shape: Shape, answer: Any, prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, list):
        turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return conversation([*prompt, *turns], _text(record, shape, "system"))
    if answer is not None and not isinstance(answer, str):
        raise BadRowError(f"'{shape.columns['answer']}' is {kind_of(answer)}, not text")
    roles = ("instruction", "input", "system")
    parts: dict[str, Any] = {role: _text(record, shape, role) for role in roles}
    parts["answer"] = answer or ""
    if not (parts["instruction"] + parts["input"]).strip():
        raise BadRowError("the prompt is empty")
    if shape.instruction and not parts["input"]:
        parts |= {"instruction": shape.instruction, "input": parts["instruction"]}
    if earlier := record.get(shape.columns.get("history", "")):
        parts["history"] = history(earlier)
    if isinstance(candidates := record.get(shape.columns.get("candidates", "")), list):
        # A file we wrote: its rows name their own labels.
        label = _text(record, shape, "label") or None
        parts |= {"candidates": tuple(map(str, candidates)), "label": label}
    elif "label" in shape.columns:
        parts |= {"candidates": shape.candidates, "label": _label(record, shape)}
    return parts


def _labeled(record: Record, shape: Shape) -> dict[str, Any]:
    text, label = _text(record, shape, "text"), _label(record, shape)
    if not text.strip():
        raise BadRowError("the text is empty")
    return {
        "instruction": _text(record, shape, "instruction") or shape.instruction,
        "input": text,
        "answer": label,
        "system": _text(record, shape, "system"),
        "label": label,
        "candidates": shape.candidates,
    }


def _label(record: Record, shape: Shape) -> str:
    value = record[shape.columns["label"]]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    raw = (plain(value) or "").strip()
    if not raw:
        raise BadRowError("it has no label")
    if not shape.labels:
        raise BadRowError(f"it is labeled '{raw}'; name all labels, as in `labels: [{raw}, ...]`")
    name = shape.names.get(folded(raw))
    if name is None:
        raise BadRowError(f"label '{raw}' is none of {', '.join(shape.candidates)}")
    return name


def _text(record: Record, shape: Shape, role: str) -> str:
    """The text in this role, or nothing."""
    column = shape.columns.get(role)
    value = record.get(column) if column else ""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"'{column}' is {kind_of(value)}, not text")
    return value


def plain(value: Any) -> str | None:
    """A text, number or truth value as text; None for anything else, and for NaN."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and not math.isnan(value):
        return str(value)
    return None


def _fields(record: Record, shape: Shape) -> dict[str, str]:
    """What plays no role, as text; our own files keep it together under `fields`."""
    used = shape.columns.values()
    rest = {name: value for name, value in record.items() if name not in used}
    if isinstance(own := rest.pop("fields", None), dict):
        rest |= own
    if "group" in shape.columns:
        rest["group"] = record[shape.columns["group"]]
    return {name: text for name, value in rest.items() if (text := plain(value)) is not None}
