"""Which column plays which role: seen from the columns, or written by the user as a column map.

After that there are five kinds of row: a conversation (`messages`), a prompt with its `answer`, one
with a `better` and a `worse` answer, a `text` with its `label`, and plain `text`. `data.convert`
makes the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from backfire.base.text import folded
from backfire.data.read import BadRowError
from backfire.errors import UserError, unknown


@dataclass(frozen=True)
class Task:
    """What the user says about the data; where that is nothing, the columns speak."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Role -> column, as `column_map` returns it. If given it alone counts."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label as it stands in the data -> its name; a name always stands for itself too."""
    instruction: str = ""
    """Put before each text; `{labels}` in it becomes the names of the labels."""


@dataclass(frozen=True)
class Shape:
    """Which column plays which role, and what the labels are called."""

    columns: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    """Columns without a role, by which a public set is recognized."""
    instruction: str = ""

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.labels.values()))

    @cached_property
    def names(self) -> dict[str, str]:
        """Everything a label may be written as (case and typography aside) -> its name."""
        names = {folded(name): name for name in self.candidates}
        return names | {folded(raw): name for raw, name in self.labels.items()}


SENTIMENT140 = {"0": "negative", "2": "neutral", "4": "positive"}
MULTILINGUAL = {"2": "negative", "1": "neutral", "0": "positive"}
THREE_WAY = {name: name for name in ("negative", "neutral", "positive")}
LABELED = {"text": "text", "label": "label"}
CHOSEN = {"better": "chosen", "worse": "rejected"}
TRUTHFUL = {"answer": "best_answer", "better": "correct_answers", "worse": "incorrect_answers"}

# The first one whose columns are all there. CoLA has the columns of SST-2: there, give `labels`.
SHAPES = (
    *(Shape({"messages": name, **CHOSEN}) for name in ("messages", "conversations")),
    *(Shape({"instruction": name, **CHOSEN}) for name in ("prompt", "instruction", "question")),
    Shape(CHOSEN),
    Shape({"instruction": "question", "better": "better", "worse": "worse"}),
    Shape({"instruction": "question", **TRUTHFUL}),
    Shape({"messages": "messages"}),
    Shape({"messages": "conversations"}),
    Shape({"instruction": "prompt", "answer": "completion"}),
    Shape({"instruction": "instruction", "answer": "output"}),
    Shape({"instruction": "question", "answer": "answer"}),
    Shape({"text": "text", "label": "target", "id": "ids"}, SENTIMENT140, ("flag", "user")),
    Shape({"text": "text", "label": "sentiment"}, SENTIMENT140, ("query", "user")),
    Shape({"text": "text", "label": "airline_sentiment"}, THREE_WAY),
    Shape(LABELED, THREE_WAY, ("airline",)),
    Shape(LABELED, MULTILINGUAL, ("language", "source")),
    Shape(LABELED, THREE_WAY, ("language",)),
    Shape({"text": "sentence", "label": "label"}, {"0": "negative", "1": "positive"}),
    Shape(LABELED),
    Shape({"text": "text"}),
)
# Columns that play the role they are named after, if they are there too.
BESIDE = {
    "messages": ("system",),
    "answer": ("input", "system", "history", "candidates", "better", "worse"),
    "better": ("input", "system"),
}

ALIASES = {
    "prompt": "instruction",
    "output": "answer",
    "completion": "answer",
    "chosen": "better",
    "rejected": "worse",
}
# What a column map must name, and may name beside it.
KINDS = (
    ({"messages", "better", "worse"}, {"system"}),
    ({"instruction", "better", "worse"}, {"answer", "input", "worse_input", "system"}),
    ({"better", "worse"}, {"system"}),
    ({"messages"}, {"system"}),
    ({"instruction", "answer"}, {"input", "system", "label"}),
    ({"text", "label"}, {"instruction", "system"}),
    ({"text"}, set[str]()),
)
ROLES = sorted(set().union(*(needed | more for needed, more in KINDS), ALIASES, {"id", "group"}))


def check_labels(labels: Any) -> Any:
    """Labels as a map, from the list or the map (with any keys) that a recipe holds."""
    if isinstance(labels, list):
        labels = [str(name) if type(name) is int else name for name in labels]
        # A number that is a name stands for itself, not for a place in the list.
        are_names = all(isinstance(name, str) for name in labels)
        if are_names and any(name.strip().isdigit() for name in labels):
            labels = {name: name for name in labels}
        else:
            labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping):
        return labels
    if labels and len({folded(str(name)) for name in labels.values()}) < 2:
        raise UserError("labels: a task needs two labels or more.")
    by_form: dict[str, str] = {}
    for name in map(str, labels.values()):
        if (other := by_form.setdefault(folded(name), name)) != name:
            raise UserError(
                f"labels: '{other}' and '{name}' differ in case or typography alone, so a row's "
                "label could not be told; rename one."
            )
    return {str(raw): name for raw, name in labels.items()}


def check_columns(columns: Any) -> Any:
    """A column map as a recipe holds it; a column may be a number. What it says must make rows."""
    if isinstance(columns, Mapping):
        columns = {str(role): column for role, column in columns.items()}
        columns |= {role: str(column) for role, column in columns.items() if type(column) is int}
        column_map(columns)
    return columns


def column_map(columns: Mapping[str, str]) -> dict[str, str]:
    """The user's column map under our names for the roles; empty for an empty one.

    Raises:
        UserError: a role is unknown, named twice or of no use, or the roles make no row.
    """
    if not columns:
        return {}
    roles: dict[str, str] = {}
    for given, column in columns.items():
        role = ALIASES.get(given, given)
        if given not in ROLES:
            raise unknown("role in columns:", given, ROLES)
        if role in roles:
            raise UserError(
                f"columns: '{given}' repeats a role; prompt is instruction, output is answer."
            )
        roles[role] = column
    # A prompt may be called text, and a text to be labeled may be called input or prompt.
    if {"answer", "better"} & set(roles) and "text" in roles and "instruction" not in roles:
        roles["instruction"] = roles.pop("text")
    for role in ("input", "instruction"):
        if "label" in roles and role in roles and not {"answer", "text"} & set(roles):
            roles["text"] = roles.pop(role)
    for needed, more in KINDS:
        if needed <= set(roles):
            if idle := set(roles) - needed - more - {"id", "group"}:
                kind = " and ".join(sorted(needed))
                raise UserError(f"columns: {', '.join(sorted(idle))} has no use beside {kind}.")
            return roles
    raise UserError(
        f"columns: {', '.join(columns)} is not enough for a row; name messages, or prompt and "
        "answer, or prompt, better and worse, or text and label, or text."
    )


def shape_of(names: Collection[str], task: Task) -> Shape:
    """The shape of a record with these columns.

    Raises:
        BadRowError: it has none of the known shapes, or lacks a column of the user's map.
    """
    if task.columns:
        lacking = [column for column in task.columns.values() if column not in names]
        if lacking:
            raise BadRowError(f"it has no column '{lacking[0]}', only: {', '.join(names)}")
        found, beside = Shape(task.columns), []
    else:
        found = _recognized(names)
        beside = [name for role in BESIDE if role in found.columns for name in BESIDE[role]]
        if "answer" in found.columns and ("candidates" in names or task.labels):
            beside.append("label")
    own = {name: name for name in (*beside, "id") if name in names}
    columns = own | dict(found.columns)
    shape = replace(found, columns=columns, labels=task.labels or found.labels)
    return replace(shape, instruction=_sentence(task, shape))


def _recognized(names: Collection[str]) -> Shape:
    for shape in SHAPES:
        if all(name in names for name in (*shape.columns.values(), *shape.also)):
            return shape
    listed = ", ".join(names)
    raise BadRowError(f"no known shape in its columns ({listed}); say which is which by `columns`")


def _sentence(task: Task, shape: Shape) -> str:
    labeled = "label" in shape.columns and "answer" not in shape.columns
    text = task.instruction or ("Classify the text as {labels}." if labeled else "")
    *others, last = shape.candidates or ("",)
    named = f"{', '.join(others)} or {last}" if others else last
    return text.replace("{labels}", named)
