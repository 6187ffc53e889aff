"""Which column plays which role: seen from the columns, or written by the user as a column map.

After that there are five kinds of row: a conversation (`messages`), a prompt with its `answer` (and
maybe `choices`), one with a `better` and a `worse` answer, a `text` with its `label`, and plain
`text`. `data.published` brings what has yet another form into one of these, and `data.convert`
makes the rows.
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
    """What the user says about the data; where that is nothing, the columns speak."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Role -> column, as `column_map` returns it. If given it alone counts."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label as it stands in the data -> its name; a name always stands for itself too."""
    instruction: str = ""
    """Put before each text; `{labels}` in it becomes the names of the labels."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> the names of its classes, where the source of the data has them."""


@dataclass(frozen=True)
class Shape:
    """Which column plays which role, and what the labels are called."""

    columns: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    more_input: tuple[str, ...] = ()
    """Columns with more of the input, in the order in which they follow it."""
    rest: tuple[str, ...] = ()
    """Columns without a role."""
    idle: tuple[str, ...] = ()
    """Those of them that are more than a number or name of the record."""
    instruction: str = ""
    is_said: bool = False
    """Whether the user said which column is which."""

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.labels.values()))

    @cached_property
    def names(self) -> dict[str, str]:
        """Everything a label may be written as (case and typography aside) -> its name."""
        return spellings(self.labels)


SENTIMENT140 = {"0": "negative", "2": "neutral", "4": "positive"}
THREE_WAY = {name: name for name in ("negative", "neutral", "positive")}
TRUTHFUL = {"answer": "best_answer", "better": "correct_answers", "worse": "incorrect_answers"}
# Public sets whose columns nobody else has, so that their labels mean what they mean there.
PUBLIC = (
    (
        {"text": "text", "label": "target", "id": "ids"},
        {"ids", "date", "flag", "user"},
        SENTIMENT140,
    ),
    ({"text": "text", "label": "sentiment"}, {"date", "query", "user"}, SENTIMENT140),
    ({"text": "text", "label": "airline_sentiment"}, set[str](), THREE_WAY),
)
# Roles that a kind may have beside those that make it, and what their columns are called.
OPTIONS = {"input": named.INPUTS, "system": named.SYSTEM, "flag": (*named.FLAGS, *named.DOUBTS)}
BESIDE = {
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
# What a column map must name, and may name beside it.
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
            raise BadRowError(f"it has no column '{lacking[0]}', only: {listed(names)}")
        own = {"id": "id"} if "id" in names else {}
        shape = Shape(own | dict(task.columns), is_said=True)
    else:
        shape = _beside(_recognized(names), names, task)
    classes = task.classes.get(shape.columns.get("label", ""), ())
    labels = task.labels or {name: name for name in classes} or shape.labels
    used = {*shape.columns.values(), *shape.more_input}
    rest = tuple(name for name in names if name not in used)
    idle = tuple(n for n in rest if n != "fields" and fold(n) not in named.IDENTIFIERS)
    shape = replace(shape, labels=labels, rest=rest, idle=idle)
    return replace(shape, instruction=_sentence(task, shape))


def _beside(shape: Shape, names: Collection[str], task: Task) -> Shape:
    """With the columns that may stand beside those that make its kind."""
    known, columns = folded(names), dict(shape.columns)
    roles = [role for kind in BESIDE if kind in columns for role in BESIDE[kind]]
    is_answered = "answer" in columns
    if is_answered and "instruction" in columns and ("candidates" in names or task.labels):
        roles = ["label", *roles]
    more: tuple[str, ...] = ()
    for role in (*roles, "id"):
        taken = columns.values()
        options = OPTIONS.get(role, (role,))
        if role == "input" and fold(columns.get("instruction", "")) in named.ORDERS:
            options = named.ORDERED
        found = [known[name] for name in options if name in known and known[name] not in taken]
        if role == "input" and columns.get("instruction") == known.get("input"):
            continue  # the prompt itself is called input
        if found and role not in columns:
            columns[role] = found[0]
            more = tuple(found[1:]) if role == "input" else more
    return replace(shape, columns=columns, more_input=more)


def _recognized(names: Collection[str]) -> Shape:
    known = folded(names)

    def pick(options: Sequence[str]) -> str:
        return next((known[name] for name in options if name in known), "")

    asked, answer, turns = pick(named.ASKED), pick(named.ANSWERS), pick(named.TURNS)
    prompt = {"messages": turns} if turns else {"instruction": asked} if asked else {}
    if {"chosen", "rejected"} <= known.keys():
        return Shape({**prompt, "better": known["chosen"], "worse": known["rejected"]})
    if asked and not answer and {"better", "worse"} <= known.keys():
        return Shape({"instruction": asked, "better": known["better"], "worse": known["worse"]})
    if asked and set(TRUTHFUL.values()) <= known.keys():
        return Shape({"instruction": asked} | {role: known[n] for role, n in TRUTHFUL.items()})
    if turns:
        return Shape({"messages": turns})
    for columns, also, labels in PUBLIC:
        if {*columns.values(), *also} <= known.keys():
            return Shape({role: known[name] for role, name in columns.items()}, labels)
    choices, key = pick(named.CHOICES), pick(named.KEYS)
    if choices and key and (question := pick(("question", "question_stem", "ctx", *named.ASKED))):
        return Shape({"instruction": question, "choices": choices, "answer": key})
    if asked == known.get("text", "") and known.keys() & {*named.LABELS[:3]}:
        answer = ""  # a text with its label, and whatever else stands beside it
    if asked and answer and asked != answer:
        return Shape({"instruction": asked, "answer": answer})
    if (document := pick(named.DOCUMENTS)) and (summary := pick(named.SUMMARIES)):
        columns = {"instruction": document, "answer": summary}
        return Shape(columns, instruction="Summarize the text.")
    if text := pick(named.TEXTS):
        if label := _label_column(known, text):
            return Shape({"text": text, "label": label})
        if text == known.get("text"):
            return Shape({"text": text})
    shown = listed(names)
    if asked:
        raise BadRowError(
            f"its prompt ('{asked}') has no answer beside it that is known by its name ({shown}); "
            "say which is which by `columns`"
        )
    unnamed = any(name.isdigit() or len(name.split()) > 3 for name in names)
    hint = " (by numbers from 0 if the file has no header)" if unnamed else ""
    raise BadRowError(
        f"no known shape in its columns ({shown}); say which is which by `columns`{hint}"
    )


def _label_column(known: Mapping[str, str], text: str) -> str:
    found = [known[name] for name in named.LABELS if name in known and known[name] != text]
    if len(found) > 1 and found[0].casefold() not in named.LABELS[:3]:
        raise BadRowError(
            f"its label may be in {listed(found)}; say which by `columns: {{text: {text}, "
            f"label: {found[0]}}}`"
        )
    return found[0] if found else ""


def _sentence(task: Task, shape: Shape) -> str:
    labeled = "label" in shape.columns and "answer" not in shape.columns
    text = task.instruction or shape.instruction
    text = text or ("Classify the text as {labels}." if labeled else "")
    *others, last = shape.candidates or ("",)
    named = f"{', '.join(others)} or {last}" if others else last
    return text.replace("{labels}", named)
