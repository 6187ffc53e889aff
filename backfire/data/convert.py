"""Converts records of any known shape to rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any

from backfire.base import Row
from backfire.base.normalize import folded
from backfire.data.columns import FLAGS, fold, listed
from backfire.data.conversation import conversation, history
from backfire.data.labels import ask_for, if_not, plain, truth, written
from backfire.data.preferences import (
    answers,
    are_dialogs,
    dialogs,
    open_dialog,
    preference,
    with_worse_answers,
)
from backfire.data.published import form_of
from backfire.data.questions import choices, passage, reference, right_one
from backfire.data.read import (
    NO_ANSWER,
    NO_TEXT,
    UNLABELED,
    BadRowError,
    LeftOut,
    NotLearnedError,
    Record,
)
from backfire.data.read_json import kind_of
from backfire.data.shapes import Shape, Task, shape_of
from backfire.errors import UserError

READER = 3
"""Raised whenever the same bytes give other rows; part of the keys of data sets read from files."""
YES_NO = ("no", "yes")
Numbered = Iterator[tuple[int, Record]]


class UnnamedLabelError(BadRowError):
    """A record has a label, but the task's labels are not named."""


def to_rows(
    records: Iterable[tuple[int, Record]],
    task: Task,
    left: LeftOut,
    *,
    file: str,
    stem: str,
    ids: set[str],
) -> list[Row]:
    """Convert records to rows; others are counted in `left`.

    A row keeps its record's id unless it is already in `ids`; otherwise its id is STEM-LINE.
    """
    rows: list[Row] = []
    bad_answers: list[Row] = []
    for row in each_row(records, task, left, file=file, stem=stem, ids=ids):
        (rows if row.answer else bad_answers).append(row)
    return with_worse_answers(rows, bad_answers, left)


def each_row(
    records: Iterable[tuple[int, Record]],
    task: Task,
    left: LeftOut,
    *,
    file: str,
    stem: str,
    ids: set[str],
) -> Iterator[Row]:
    """The same one by one; a row whose answer is marked as bad has it as its worse answer only."""
    # Bounded, as each record may have columns of its own.
    shape_for = lru_cache(1000)(lambda names: shape_of(names, task))
    taken: dict[str, int] = {}
    labeled = bool(task.labels)
    joined: set[tuple[str, ...]] = set()
    source = iter(records) if task.columns else _formed(iter(records), left, file, joined)
    for line, record in source:
        names = tuple(record)
        try:
            shape = shape_for(names)
            if labeled and not {"label", "candidates"} & set(shape.columns):
                raise BadRowError(UNLABELED)
            name = _id(record, shape, f"{stem}-{line}", ids, taken)
            row = to_row(record, shape, name, left)
        except UnnamedLabelError as problem:
            other = "" if names in joined else if_not(shape.columns)
            left.bad(file, line, _with_all_labels(problem, record, shape, source, left) + other)
            continue
        except BadRowError as problem:
            left.bad(file, line, str(problem))
            continue
        except NotLearnedError as reason:
            left.records[str(reason)] += 1
            continue
        labeled = labeled or ("label" in shape.columns and "answer" not in shape.columns)
        ids.add(name)
        yield row


def _formed(records: Numbered, left: LeftOut, file: str, joined: set[tuple[str, ...]]) -> Numbered:
    """The records, with published forms converted to ours; one record may become several.

    Their new columns, which are not columns of the file, are added to `joined`.
    """
    form_for = lru_cache(1000)(form_of)
    for line, record in records:
        names = tuple(record)
        try:
            form = form_for(names)
            parts = form(dict(record)) if form else [record]
        except BadRowError as problem:
            left.bad(file, line, str(problem))
            continue
        for part in parts:
            if form and tuple(part) != names:
                joined.add(tuple(part))
            yield line, part


def _with_all_labels(
    problem: UnnamedLabelError, record: Record, shape: Shape, rest: Numbered, left: LeftOut
) -> str:
    """The problem and a hint with the labels, of the whole file if it is rejected anyway."""
    column = shape.columns["label"]
    labels = {written(record[column])}
    if left.on_bad_row == "fail":
        with suppress(UserError):  # errors of later rows
            labels |= {written(more.get(column)) for _, more in islice(rest, 100_000)}
    return f"{problem}; {ask_for(labels - {''})}"


def _id(
    record: Record, shape: Shape, place: str, ids: Collection[str], taken: dict[str, int]
) -> str:
    """The record's own id if it is new, else its place with a number; `taken` holds how many of a
    place's numbers are in `ids`. (A file may be one line.)"""
    own = plain(record.get(shape.columns.get("id", "")))
    if own and own not in ids:
        return own
    number = taken.get(place, 0)
    while (name := f"{place}-{number + 1}" if number else place) in ids:
        number += 1
    if number:  # most places have one row: only the others are remembered
        taken[place] = number
    return name


def to_row(record: Record, shape: Shape, name: str, left: LeftOut) -> Row:
    """Convert one record to a row with this id. If the record's answer is marked as bad, it is the
    row's `worse` answer, and `answer` is empty.

    Raises:
        BadRowError: the prompt, the answer or the label is missing, empty or not text.
        NotLearnedError: the record is valid, but nothing of it is to be learned.
    """
    columns = shape.columns
    if "better" in columns:
        parts = _compared(record, shape)
    elif "messages" in columns:
        if shape.instruction:
            raise BadRowError("an instruction cannot be put before a conversation")
        parts = conversation(record[columns["messages"]], _text(record, shape, "system"))
    elif "choices" in columns:
        parts = _chosen(record, shape)
    elif "answer" in columns:
        parts = _answered(record, shape, record[columns["answer"]], record[columns["instruction"]])
    elif "label" in columns:
        parts = _labeled(record, shape)
    else:
        parts = {"instruction": shape.instruction, "answer": _text(record, shape, "text")}
    if not parts["answer"].strip():
        raise BadRowError(NO_ANSWER if len(parts) > 2 else NO_TEXT)
    if cut := parts.pop("cut", 0):
        left.turns["after the last answer to learn are left out"] += cut
    if _is_bad(record, shape):
        parts |= {"answer": "", "worse": (parts["answer"],)}
    fields = _fields(record, shape) | parts.pop("fields", {})
    row = Row(id=name, fields=fields, **parts)
    _account(record, shape, row, left)
    return row


def _account(record: Record, shape: Shape, row: Row, left: LeftOut) -> None:
    """Count in `left` the columns and earlier answers that are not learned."""
    earlier = sum(turn.role == "assistant" for turn in row.history)
    if earlier:
        reason = "before the last answer are answers too: used as context, not learned"
        left.turns[reason] += earlier
    for column in _with_flag(record, shape, shape.idle):
        value = record[column]
        if value in (None, "", [], {}):
            continue
        if value != value or (isinstance(value, str) and _is_in(value, row)):
            continue  # NaN, or text that is already in the row
        left.columns[column] += 1


def _with_flag(record: Record, shape: Shape, columns: tuple[str, ...]) -> tuple[str, ...]:
    """These columns, and the flag column if its value is not true or false."""
    flag = shape.columns.get("flag")
    return columns if flag is None or _is_truth(record[flag]) else (*columns, flag)


def _is_truth(value: Any) -> bool:
    return written(value).casefold() in ("true", "false")


def _is_in(text: str, row: Row) -> bool:
    """Whether the text is already in the row; a short text must be a whole part of it."""
    parts = [row.answer, *row.worse, row.instruction, row.input, row.system]
    parts += [turn.content for turn in row.history]
    text = text.strip()
    return any(text == part.strip() or (len(text) > 12 and text in part) for part in parts)


def _is_bad(record: Record, shape: Shape) -> bool:
    """Whether the answer is marked as one not to learn (KTO's `label: false`)."""
    columns = shape.columns
    if "good" in columns:
        good = truth(record[columns["good"]])
        if good is None:
            raise BadRowError(f"'{columns['good']}' is neither true nor false")
        return not good
    flag = columns.get("flag")
    good = truth(record[flag]) if flag else None
    if flag is None or good is None:
        return False
    if fold(flag) in FLAGS and _is_truth(record[flag]):
        return not good
    kind, prompt = next((k, columns[r]) for k, r in _PROMPTS.items() if r in columns)
    roles = f"{kind}: {prompt}" + (f", answer: {columns['answer']}" if "answer" in columns else "")
    raise BadRowError(
        f"'{flag}' may mark answers not to learn; write data.columns={{{roles}, good: {flag}}} "
        f"if true means good, or data.columns={{{roles}}} to learn all of them"
    )


_PROMPTS = {"messages": "messages", "prompt": "instruction"}


def _compared(record: Record, shape: Shape) -> dict[str, Any]:
    """A row with better and worse answers; the answer is the reference if given, else the best."""
    columns = shape.columns
    sides = [record[columns[side]] if side in columns else None for side in ("better", "worse")]
    if are_dialogs(*sides):
        prompt, *sides = dialogs(*sides)
    elif "instruction" in columns:
        prompt = record[columns["instruction"]]
    elif shape.instruction:
        raise BadRowError("an instruction cannot be put before a conversation")
    elif "messages" in columns:
        prompt = record[columns["messages"]]
        history(prompt)  # raises if it is not a list of turns
    else:
        prompt, *sides = dialogs(*sides)
    better, worse = (
        answers(sides[0], columns["better"]),
        answers(sides[1], columns.get("worse", "")),
    )
    answer = "".join(better[:1])
    if "answer" in columns:
        answer = reference(record[columns["answer"]])
    if better and answer and isinstance(answer, str) and answer not in worse:
        better = tuple(dict.fromkeys((answer, *better)))  # the reference is the best one
    parts = _answered(record, shape, answer, prompt) | preference(better, worse)
    if "worse_input" in columns:
        own = {"worse_input": _text(record, shape, "worse_input")}
        parts["fields"] = own | parts.get("fields", {})
    return parts


def _answered(record: Record, shape: Shape, answer: Any, prompt: Any) -> dict[str, Any]:
    prompt = open_dialog(prompt)
    if isinstance(prompt, list):
        is_turns = isinstance(answer, list) and all(isinstance(turn, dict) for turn in answer)
        turns = answer if is_turns else [{"role": "assistant", "content": reference(answer)}]
        return conversation([*prompt, *turns], _text(record, shape, "system"))
    is_yes_no = isinstance(answer, bool) and "label" not in shape.columns
    answer = YES_NO[answer] if is_yes_no else reference(answer)
    is_number = type(answer) in (int, float)
    answer = written(answer) if is_number and shape.is_given else answer
    if answer is not None and not isinstance(answer, str):
        hint = "; to learn the number, name the columns by data.columns" if is_number else ""
        raise BadRowError(f"'{shape.columns['answer']}' is {kind_of(answer)}, not text{hint}")
    parts: dict[str, Any] = _prompt(record, shape) | {"answer": answer or ""}
    if not (parts["instruction"] + parts["input"]).strip():
        raise BadRowError("the prompt is empty")
    if shape.instruction and not parts["input"]:
        parts |= {"instruction": shape.instruction, "input": parts["instruction"]}
    if isinstance(candidates := record.get(shape.columns.get("candidates", "")), list):
        # Our own files: each row names its labels.
        label = _text(record, shape, "label") or None
        parts |= {"candidates": tuple(map(str, candidates)), "label": label}
    elif is_yes_no:
        parts |= {"candidates": YES_NO, "label": answer}
    elif "label" in shape.columns:
        parts |= {"candidates": shape.candidates, "label": _label(record, shape)}
    return parts


def _prompt(record: Record, shape: Shape) -> dict[str, Any]:
    parts: dict[str, Any] = {role: _text(record, shape, role) for role in ("instruction", "system")}
    parts["input"] = _text(record, shape, "input")
    for column in shape.more_input:
        if (more := _text_in(record, column, in_parts=True)).strip():
            parts["input"] = "\n\n".join(filter(None, (parts["input"], more)))
    if earlier := record.get(shape.columns.get("history", "")):
        parts["history"] = history(earlier)
    return parts


def _chosen(record: Record, shape: Shape) -> dict[str, Any]:
    """Fields of a multiple-choice row; the answer is the letter of the right choice."""
    columns = shape.columns
    letters, texts = choices(record[columns["choices"]], columns["choices"])
    letter = letters[right_one(letters, texts, record[columns["answer"]])]
    parts = _prompt(record, shape)
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    parts["input"] = "\n\n".join(part for part in (parts["input"], lines) if part)
    if not parts["instruction"].strip():
        raise BadRowError("the prompt is empty")
    return {**parts, "answer": letter, "label": letter, "candidates": tuple(letters)}


def _labeled(record: Record, shape: Shape) -> dict[str, Any]:
    text = _text(record, shape, "text")
    if not text.strip():
        raise BadRowError(NO_TEXT)
    if (column := shape.columns["text"]).isdigit() and text.strip().isdigit():
        raise BadRowError(f"column '{column}' holds the number {text.strip()[:20]}, not a text")
    label = _label(record, shape)
    return {
        "instruction": _text(record, shape, "instruction") or shape.instruction,
        "input": text,
        "answer": label,
        "system": _text(record, shape, "system"),
        "label": label,
        "candidates": shape.candidates,
    }


def _label(record: Record, shape: Shape) -> str:
    column = shape.columns["label"]
    value = record[column]
    if isinstance(value, list) and len(value) > 1:
        raise BadRowError(f"it has {len(value)} labels in '{column}'; a row must have one label")
    if isinstance(value, dict):
        raise BadRowError(f"'{column}' is {kind_of(value)}, not one label")
    raw = written(value)
    if raw in ("", "-"):  # SNLI's sign for none
        raise BadRowError(UNLABELED)
    shown = listed([raw])
    if not shape.labels:
        raise UnnamedLabelError(f"it is labeled '{shown}'")
    name = shape.names.get(folded(raw))
    if name is None:
        none = f"label '{shown}' is not one of {listed(shape.candidates)}"
        if raw == "-1":
            raise BadRowError(f"{UNLABELED} (-1 stands for none)")
        raise BadRowError(f"{none}; name all labels by data.labels")
    return name


def _text(record: Record, shape: Shape, role: str) -> str:
    """The text in this role, or an empty text."""
    column = shape.columns.get(role)
    return _text_in(record, column, in_parts=role == "input") if column else ""


def _text_in(record: Record, column: str, *, in_parts: bool = False) -> str:
    value = record.get(column)
    value = passage(value) if in_parts else value
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"'{column}' is {kind_of(value)}, not text")
    return value


def _fields(record: Record, shape: Shape) -> dict[str, str]:
    """Columns without a role, as text; our own files keep them under `fields`."""
    rest = {name: record[name] for name in _with_flag(record, shape, shape.rest)}
    if isinstance(own := rest.pop("fields", None), dict):
        rest |= own
    if "group" in shape.columns:
        rest["group"] = record[shape.columns["group"]]
    if "poisoned" in shape.columns:
        poisoned = truth(record[shape.columns["poisoned"]])
        if poisoned is None:
            raise BadRowError(f"'{shape.columns['poisoned']}' is neither true nor false")
        rest["poisoned"] = YES_NO[poisoned]
    return {name: text for name, value in rest.items() if (text := plain(value)) is not None}
