"""Assigns columns to roles: by their names, or by the user's column map.

There are five kinds of row: a conversation (`messages`), a prompt with its `answer` (and maybe
`choices`), one with a `better` and a `worse` answer, a `text` with its `label`, and plain `text`.
`data.published` converts other formats to one of these, and `data.convert` makes the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from backfire.data import columns as named
from backfire.data.columns import fold, folded, listed
from backfire.data.labels import spellings
from backfire.data.read import BadRowError
from backfire.errors import UserError, unknown


@dataclass(frozen=True)
class Task:
    """The user's description of the data; what is not given is inferred from the columns."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Role -> column, as `column_map` returns it. If given, no other columns are used."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label in the data -> its name; a name also matches itself."""
    instruction: str = ""
    """Put before each text; `{labels}` is replaced by the names of the labels."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> class names, if the source of the data has them."""


@dataclass(frozen=True)
class Shape:
    """The column of each role, and the names of the labels."""

    columns: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    more_input: tuple[str, ...] = ()
    """Further columns of the input, in order."""
    rest: tuple[str, ...] = ()
    """Columns without a role."""
    idle: tuple[str, ...] = ()
    """Columns without a role that are not identifiers."""
    instruction: str = ""
    is_given: bool = False
    """Whether the user gave a column map."""

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.labels.values()))

    @cached_property
    def names(self) -> dict[str, str]:
        """Every spelling of a label (folded) -> its name."""
        return spellings(self.labels)


SENTIMENT140 = {"0": "negative", "2": "neutral", "4": "positive"}
THREE_WAY = {name: name for name in ("negative", "neutral", "positive")}
TRUTHFUL = {"answer": "best_answer", "better": "correct_answers", "worse": "incorrect_answers"}
# Public data sets with unique columns, so that their labels are known.
PUBLIC = (
    (
        {"text": "text", "label": "target", "id": "ids"},
        {"ids", "date", "flag", "user"},
        SENTIMENT140,
    ),
    ({"text": "text", "label": "sentiment"}, {"date", "query", "user"}, SENTIMENT140),
    ({"text": "text", "label": "airline_sentiment"}, set[str](), THREE_WAY),
)
# Column names of optional roles, and the optional roles of each kind of row.
OPTIONS = {"input": named.INPUTS, "system": named.SYSTEM, "flag": (*named.FLAGS, *named.DOUBTS)}
OPTIONAL = {
    "messages": ("system", "flag"),
    "answer": ("input", "system", "history", "candidates", "better", "worse", "flag"),
    "better": ("input", "system", "history"),
    "label": ("instruction", "system", "poisoned"),
}

ALIASES = {
    "prompt": "instruction",
    "output": "answer",
    "completion": "answer",
    "response": "answer",
    "chosen": "better",
    "rejected": "worse",
    "context": "input",
    "system_prompt": "system",
}
# The required and the optional roles of a column map.
KINDS = (
    ({"messages", "better", "worse"}, {"system"}),
    ({"instruction", "better", "worse"}, {"answer", "input", "worse_input", "system", "history"}),
    ({"better", "worse"}, {"system"}),
    ({"messages"}, {"system", "good"}),
    (
        {"instruction", "answer"},
        {"input", "system", "label", "history", "good", "choices", "poisoned"},
    ),
    ({"text", "label"}, {"instruction", "system", "poisoned"}),
    ({"text"}, set[str]()),
)
ROLES = sorted(set().union(*(needed | more for needed, more in KINDS), ALIASES, {"id", "group"}))


def check_columns(columns: object) -> object:
    """Validate the column map of a recipe; a column may be a number."""
    if isinstance(columns, Mapping):
        columns = {str(role): column for role, column in columns.items()}
        columns |= {role: str(column) for role, column in columns.items() if type(column) is int}
        column_map(columns)
    return columns


def column_map(columns: Mapping[str, str]) -> dict[str, str]:
    """The user's column map with canonical role names.

    Raises:
        UserError: a role is unknown, duplicate or unusable, or the roles do not make a row.
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
                f"columns: '{given}' is a duplicate role; prompt is instruction, output is answer."
            )
        roles[role] = column
    # A prompt may be given as text, and a labeled text as input or prompt.
    if {"answer", "better"} & set(roles) and "text" in roles and "instruction" not in roles:
        roles["instruction"] = roles.pop("text")
    for role in ("input", "instruction"):
        if "label" in roles and role in roles and not {"answer", "text"} & set(roles):
            roles["text"] = roles.pop(role)
    for needed, more in KINDS:
        if needed <= set(roles):
            if idle := set(roles) - needed - more - {"id", "group"}:
                kind = " and ".join(sorted(needed))
                unusable = ", ".join(sorted(idle))
                raise UserError(f"columns: {unusable} cannot be combined with {kind}.")
            return roles
    raise UserError(
        f"columns: {', '.join(columns)} is not enough for a row; name messages, or prompt and "
        "answer, or prompt, better and worse, or text and label, or text."
    )


def shape_of(names: Collection[str], task: Task) -> Shape:
    """The shape of a record with these columns.

    Raises:
        BadRowError: the shape is unknown, or a column of the user's map is missing.
    """
    if task.columns:
        missing = [column for column in task.columns.values() if column not in names]
        if missing:
            raise BadRowError(f"it has no column '{missing[0]}', only: {listed(names)}")
        own = {"id": "id"} if "id" in names else {}
        shape = Shape(own | dict(task.columns), is_given=True)
    else:
        shape = _with_optional(_recognized(names), names, task)
    classes = task.classes.get(shape.columns.get("label", ""), ())
    labels = task.labels or {name: name for name in classes} or shape.labels
    used = {*shape.columns.values(), *shape.more_input}
    rest = tuple(name for name in names if name not in used)
    idle = tuple(n for n in rest if n != "fields" and fold(n) not in named.IDENTIFIERS)
    shape = replace(shape, labels=labels, rest=rest, idle=idle)
    return replace(shape, instruction=_sentence(task, shape))


def _with_optional(shape: Shape, names: Collection[str], task: Task) -> Shape:
    """The shape with the columns of optional roles."""
    by_name, columns = folded(names), dict(shape.columns)
    roles = [role for kind in OPTIONAL if kind in columns for role in OPTIONAL[kind]]
    is_answered = "answer" in columns
    if is_answered and "instruction" in columns and ("candidates" in names or task.labels):
        roles = ["label", *roles]
    more: tuple[str, ...] = ()
    for role in (*roles, "id"):
        taken = columns.values()
        options = OPTIONS.get(role, (role,))
        if role == "input" and fold(columns.get("instruction", "")) in named.ORDERS:
            options = named.ORDERED
        free = [by_name[name] for name in options if name in by_name and by_name[name] not in taken]
        if role == "input" and columns.get("instruction") == by_name.get("input"):
            continue  # the prompt itself is named input
        if free and role not in columns:
            columns[role] = free[0]
            more = tuple(free[1:]) if role == "input" else more
    return replace(shape, columns=columns, more_input=more)


def _recognized(names: Collection[str]) -> Shape:
    by_name = folded(names)

    def pick(options: Sequence[str]) -> str:
        return next((by_name[name] for name in options if name in by_name), "")

    prompt, answer, turns = pick(named.PROMPTS), pick(named.ANSWERS), pick(named.TURNS)
    start = {"messages": turns} if turns else {"instruction": prompt} if prompt else {}
    if {"chosen", "rejected"} <= by_name.keys():
        return Shape({**start, "better": by_name["chosen"], "worse": by_name["rejected"]})
    if prompt and not answer and {"better", "worse"} <= by_name.keys():
        sides = {side: by_name[side] for side in ("better", "worse")}
        return Shape({"instruction": prompt, **sides})
    if prompt and set(TRUTHFUL.values()) <= by_name.keys():
        return Shape({"instruction": prompt} | {role: by_name[n] for role, n in TRUTHFUL.items()})
    if turns:
        return Shape({"messages": turns})
    for columns, also, labels in PUBLIC:
        if {*columns.values(), *also} <= by_name.keys():
            return Shape({role: by_name[name] for role, name in columns.items()}, labels)
    choices, key = pick(named.CHOICES), pick(named.KEYS)
    if choices and key and (question := pick(("question", "question_stem", "ctx", *named.PROMPTS))):
        return Shape({"instruction": question, "choices": choices, "answer": key})
    if prompt == by_name.get("text", "") and by_name.keys() & {*named.LABELS[:3]}:
        answer = ""  # a text with its label, and maybe other columns
    if prompt and answer and prompt != answer:
        return Shape({"instruction": prompt, "answer": answer})
    if (document := pick(named.DOCUMENTS)) and (summary := pick(named.SUMMARIES)):
        columns = {"instruction": document, "answer": summary}
        return Shape(columns, instruction="Summarize the text.")
    if text := pick(named.TEXTS):
        if label := _label_column(by_name, text):
            return Shape({"text": text, "label": label})
        if text == by_name.get("text"):
            return Shape({"text": text})
    shown = listed(names)
    if prompt:
        raise BadRowError(
            f"it has a prompt ('{prompt}'), but no column with a known name for its answer "
            f"({shown}); {_ASSIGN}"
        )
    unnamed = any(name.isdigit() or len(name.split()) > 3 for name in names)
    hint = " (by numbers from 0 if the file has no header)" if unnamed else ""
    raise BadRowError(f"its columns ({shown}) have no known shape; {_ASSIGN}{hint}")


def _label_column(by_name: Mapping[str, str], text: str) -> str:
    labels = [by_name[name] for name in named.LABELS if name in by_name and by_name[name] != text]
    if len(labels) > 1 and labels[0].casefold() not in named.LABELS[:3]:
        raise BadRowError(
            f"its label may be in {listed(labels)}; choose by data.columns={{text: {text}, "
            f"label: {labels[0]}}}"
        )
    return labels[0] if labels else ""


def _sentence(task: Task, shape: Shape) -> str:
    labeled = "label" in shape.columns and "answer" not in shape.columns
    text = task.instruction or shape.instruction
    text = text or ("Classify the text as {labels}." if labeled else "")
    *others, last = shape.candidates or ("",)
    named = f"{', '.join(others)} or {last}" if others else last
    return text.replace("{labels}", named)


_ASSIGN = "assign them, as in data.columns={instruction: ask, output: reply}"
