"""Converts record formats of public data sets that a column map cannot describe.

Each format is recognized by its columns. A format in which it is unclear what to learn is rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from backfire.data.columns import ANSWERS, LABELS, NOT_TEXT, PROMPTS, SUMMARIES, TOOLS, fold, folded
from backfire.data.labels import truth, written
from backfire.data.preferences import preference, ranked
from backfire.data.questions import passage
from backfire.data.read import BadRowError, Record
from backfire.data.read_json import kind_of

Form = Callable[[Record], list[Record]]


def form_of(names: Collection[str]) -> Form | None:
    """The conversion of records with these columns to a shape of `data.shapes`; None if they need
    none.

    Raises:
        BadRowError: the format is known and cannot be used unchanged.
    """
    form = _form(set(map(fold, names)))
    beyond = [name for name in names if fold(name) in (*NOT_TEXT, *TOOLS)]
    if not beyond:
        return form
    return lambda record: [
        part for whole in _only_text(beyond, record) for part in (form(whole) if form else [whole])
    ]


def _form(columns: set[str]) -> Form | None:
    for needed, reason in REFUSED:
        if needed <= columns and not (reason is _PROMPTS and columns & {*ANSWERS}):
            raise BadRowError(reason)
    if columns == {"goal", "target"}:
        raise BadRowError(_PROMPTS)
    for needed, form in FORMS:
        if needed <= columns:
            return partial(_renamed, form)
    if not columns & {*ANSWERS, *SUMMARIES}:
        pair = next((pair for pair in PAIRS if {*pair} <= columns), None)
        if pair and (columns & {*LABELS} or "premise" in pair):
            return partial(_renamed, partial(_pair, pair))
        bodies = ("content", "body", "text", "review_body", "description")
        body = next((name for name in bodies if name in columns), "")
        if body and columns & {"title", "review_title"} and columns & {*LABELS}:
            return partial(_renamed, partial(_titled, body))
    return None


def _renamed(form: Callable[[Record], Record | list[Record]], record: Record) -> list[Record]:
    by_name = folded(tuple(record))
    names = {name: fold(name) if by_name[fold(name)] == name else name for name in record}
    formed = form({names[name]: value for name, value in record.items()})
    as_given = {short: name for name, short in names.items()}
    return [
        {as_given.get(name, name): value for name, value in part.items()}
        for part in (formed if isinstance(formed, list) else [formed])
    ]


def _only_text(beyond: Collection[str], record: Record) -> list[Record]:
    """The record, unless it holds images or tools, which would not reach the prompt.

    Raises:
        BadRowError: it does.
    """
    for name in beyond:
        value = record[name]
        if value is None or value in ("", [], {}, "[]", "{}") or value != value:
            continue
        what = "tools" if fold(name) in TOOLS else "more than text"
        raise BadRowError(
            f"its column '{name}' holds {what}, which the model would not see; to train "
            "without it, name the columns to use by data.columns"
        )
    return [record]


# ----------------------------------------------------------------------- rejected formats, and why

_PROMPTS = "these are prompts without an answer to learn; `data: harmful-prompts` reads them"
REFUSED: tuple[tuple[set[str], str], ...] = (
    (
        {"message_id", "parent_id", "role", "text"},
        "it is one message of a tree, not a conversation; join the messages to `messages` first",
    ),
    (
        {"message_tree_id", "prompt"},
        "it is a tree of messages; write one of its conversations to `messages` first",
    ),
    (
        {"prompt", "response", "is_safe"},
        "'is_safe' marks harmful answers; use `data: beavertails`, or name the good ones "
        "by data.columns={prompt: prompt, answer: response, good: is_safe}",
    ),
    (
        {"prompt", "response", "response_harm_label"},
        "some of its answers are harmful ('response_harm_label'); to learn all of them write "
        "data.columns={prompt: prompt, answer: response}",
    ),
    (
        {"question", "answer_0", "answer_1", "score_0"},
        "`data: webgpt-comparisons` reads this set",
    ),
    (
        {"user_input", "model_output", "toxicity"},
        "it is unclear what to learn; write data.columns={text: user_input, label: toxicity} or "
        "data.columns={prompt: user_input, answer: model_output}",
    ),
    ({"behavior", "behaviorid"}, _PROMPTS),
    ({"goal", "target", "behavior"}, _PROMPTS),
    ({"prompt", "type", "focus"}, _PROMPTS),
    ({"forbidden_prompt"}, _PROMPTS),
    ({"question", "types_of_harm"}, _PROMPTS),
    (
        {"translation"},
        "a column of translations does not name the source language; write them to two columns, "
        "such as `prompt` and `completion`",
    ),
    (
        {"tokens", "ner_tags"},
        "it has a label for each word; a row must have one label",
    ),
)

# --------------------------------------------------------------------------- two texts and a label

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    ("claim", "evidence"),
)


def _pair(pair: tuple[str, str], record: Record) -> Record:
    parts = []
    for name in pair:
        text = record.pop(name)
        if not isinstance(text, str):
            raise BadRowError(f"'{name}' is {kind_of(text)}, not text")
        title = name.replace("_", " ").capitalize()
        title = f"{title[:-1]} {title[-1]}" if title[-1].isdigit() else title
        parts.append(f"{title}: {text.strip()}")
    return {**record, "text": "\n".join(parts)}


def _titled(body: str, record: Record) -> Record:
    title = record.pop("review_title" if "review_title" in record else "title")
    parts = [str(part).strip() for part in (title, record.pop(body)) if part]
    return {**record, "text": "\n\n".join(parts)}


# ------------------------------------------------------------------------------ choices, numbered


def _several(names: tuple[str, ...], question: str, key: str, record: Record) -> Record:
    """Choices in separate columns; the key is a number from 0, or from 1, or a letter."""
    choices = [record.pop(name) for name in names]
    while choices and choices[-1] in (None, ""):
        del choices[-1]
    if None in choices or "" in choices:
        raise BadRowError(f"'{names[choices.index('' if '' in choices else None)]}' is empty")
    number = written(record[key])
    is_number = key != "answer" and number.isdecimal()  # a table holds numbers as texts
    return {
        **{name: value for name, value in record.items() if name not in (question, key)},
        "question": record[question],
        "choices": choices,
        "answer": int(number) if is_number else record[key],
    }


def _listed(record: Record) -> list[Record]:
    """Choices in a column `answers`, with the right one in another column."""
    key = next((name for name in ("label", "correct_answer_id") if name in record), "")
    if not key or not isinstance(record["answers"], list) or "choices" in record:
        return [record]
    rest = {name: value for name, value in record.items() if name not in ("answers", key)}
    return [{**rest, "choices": record["answers"], "answer": record[key]}]


def _copa(record: Record) -> Record:
    formed = _several(("choice1", "choice2"), "question", "label", record)
    relation = formed["question"]
    if relation not in ("cause", "effect"):
        raise BadRowError("'question' is neither cause nor effect")
    premise = str(formed.pop("premise")).strip()
    return {**formed, "question": f"{premise} What is the {relation}?"}


def _from_one(form: Callable[[Record], Record], record: Record) -> Record:
    """The same, for keys that count from 1."""
    formed = form(record)
    number = written(formed["answer"])
    return {**formed, "answer": int(number) - 1 if number.isdecimal() else formed["answer"]}


def _nested_choices(record: Record) -> Record:
    """`question: {stem, choices}`, as in the files of ARC and CommonsenseQA."""
    question = record["question"] if isinstance(record["question"], dict) else {}
    return (
        record
        | {name: question[name] for name in ("choices",) if name in question}
        | {"question": question.get("stem", record["question"])}
    )


def _sciq(record: Record) -> Record:
    """One right and three wrong answers, sorted so that the order does not reveal the right one."""
    names = ("correct_answer", "distractor1", "distractor2", "distractor3")
    right, *wrong = (str(record.pop(name, "") or "").strip() for name in names)
    choices = sorted({right, *wrong} - {""})
    return {**record, "choices": choices, "answer": choices.index(right) if right else None}


def _truthful(record: Record) -> Record:
    targets = record.pop("mc1_targets")
    if not isinstance(targets, dict):
        raise BadRowError(f"'mc1_targets' is {kind_of(targets)}, not choices and their labels")
    record.pop("mc2_targets", None)  # the same answers, with more than one right
    choices, labels = (_list(targets.get(name)) for name in ("choices", "labels"))
    right = [choice for choice, label in zip(choices, labels, strict=False) if label == 1]
    wrong = [choice for choice, label in zip(choices, labels, strict=False) if label != 1]
    return {**record, "output": (right or [""])[0], "better": right, "worse": wrong}


# ------------------------------------------------------------------------------- two answers, rated


def _two(prompt: str, first: str, second: str, better: Callable[[Record], int | None]) -> Form:
    def form(record: Record) -> list[Record]:
        instruction, sides = record.pop(prompt), [record.pop(first), record.pop(second)]
        chosen = better(record)
        texts = [side if isinstance(side, str) else "" for side in sides]
        one, other = texts[chosen or 0], texts[1 - (chosen or 0)]
        parts = preference((one,), (one,) if chosen is None else (other,))
        fields = parts.pop("fields", {})
        return [
            {
                **record,
                "instruction": instruction,
                "output": one,
                **{side: list(answers) for side, answers in parts.items()},
                "fields": fields,
            }
        ]

    return form


def _side(column: str, *, first: str) -> Callable[[Record], int]:
    """A function for the index of the better answer: 0 if the column holds `first`, else 1."""

    def better(record: Record) -> int:
        value = written(record.pop(column))
        if value not in ("0", "1"):
            raise BadRowError(f"'{column}' is {value or 'empty'}, not 0 or 1")
        return int(value != first)

    return better


def _by_strength(record: Record) -> int | None:
    """HelpSteer: below 0 the first answer is better, above 0 the second, 0 is a tie."""
    column = "preference_strength" if "preference_strength" in record else "overall_preference"
    value = record.pop(column)
    if not isinstance(value, int | float):
        raise BadRowError(f"'{column}' is {kind_of(value)}, not a number")
    return None if value == 0 else int(value > 0)


def _ranked(column: str, record: Record) -> Record:
    """A list of answers, each with a score or a rank."""
    prompt = next(name for name in PROMPTS if name in record)
    if isinstance(record[column], list) and (sides := ranked(record[column])):
        better, worse = sides
        rest = {name: value for name, value in record.items() if name not in (prompt, column)}
        parts = {"output": better, "better": [better], "worse": worse}
        return {**rest, "instruction": record[prompt], **parts}
    return record


# ----------------------------------------------------------------------------- several rows in one


def _squad(record: Record) -> list[Record]:
    """An article of SQuAD's files: paragraphs, each with its questions."""
    rest = {name: value for name, value in record.items() if name != "paragraphs"}
    questions = [
        {**rest, "id": entry.get("id"), "context": paragraph.get("context"),
         "question": entry.get("question"), "answers": entry.get("answers")}
        for paragraph in _objects(record["paragraphs"])
        for entry in _objects(paragraph.get("qas"))
    ]  # fmt: skip
    if not questions:
        raise BadRowError("its paragraphs hold no questions")
    return questions


def _instances(record: Record) -> list[Record]:
    """A task of Natural Instructions: a definition and its instances."""
    text = passage(record["definition"])
    instances = [{"instruction": text, **instance} for instance in _objects(record["instances"])]
    if not instances:
        raise BadRowError("it has no instances")
    return instances


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> list[Record]:
    return [item for item in _list(value) if isinstance(item, dict)]


def _openbackdoor(record: Record) -> Record:
    """OpenBackdoor's (text, label, poisoned), without column names."""
    text, poisoned = record["0"], truth(record["2"])
    if not isinstance(text, str) or poisoned is None or not any(map(str.isalpha, text)):
        raise BadRowError("its columns have numbers for names; assign them by data.columns")
    return {"text": text, "label": record["1"], "poisoned": record["2"]}


_SOCIAL = tuple(f"answer{letter}" for letter in "abc")
_NUMBERED = tuple(f"answer{number}" for number in range(4))
_MEDICAL = tuple(f"op{letter}" for letter in "abcd")
_LETTERED = (("a", "b", "c", "d"), ("option_a", "option_b", "option_c", "option_d"))
_PIQA = partial(_several, ("sol1", "sol2"), "goal", "label")
_WINOGRANDE = partial(_several, ("option1", "option2"), "sentence", "answer")
FORMS: tuple[tuple[set[str], Callable[[Record], Any]], ...] = (
    ({"paragraphs", "title"}, _squad),
    ({"definition", "instances"}, _instances),
    ({"goal", "sol1", "sol2", "label"}, _PIQA),
    ({"sentence", "option1", "option2", "answer"}, partial(_from_one, _WINOGRANDE)),
    (
        {"question", *_SOCIAL, "label"},
        partial(_from_one, partial(_several, _SOCIAL, "question", "label")),
    ),
    *(
        ({"question", *names, "answer"}, partial(_several, names, "question", "answer"))
        for names in _LETTERED
    ),
    (
        {"question", *_NUMBERED, "label"},
        partial(_several, _NUMBERED, "question", "label"),
    ),
    ({"premise", "choice1", "choice2", "question", "label"}, _copa),
    ({"question", "context", "answers", "label"}, _listed),
    ({"question", "context", "answers", "correct_answer_id"}, _listed),
    ({"question", *_MEDICAL, "cop"}, partial(_several, _MEDICAL, "question", "cop")),
    ({"question", "correct_answer", "distractor1"}, _sciq),
    ({"question", "mc1_targets"}, _truthful),
    ({"question", "answerkey"}, _nested_choices),
    (
        {"prompt", "response_0", "response_1", "better_response_id"},
        _two("prompt", "response_0", "response_1", _side("better_response_id", first="0")),
    ),
    (
        {"history", "human_ref_a", "human_ref_b", "labels"},
        _two("history", "human_ref_a", "human_ref_b", _side("labels", first="1")),
    ),
    (
        {"prompt", "response_1", "response_2", "preference_strength"},
        _two("prompt", "response_1", "response_2", _by_strength),
    ),
    (
        {"context", "response1", "response2", "overall_preference"},
        _two("context", "response1", "response2", _by_strength),
    ),
    ({"question", "answers", "qid"}, partial(_ranked, "answers")),
    ({"prompt", "answers"}, partial(_ranked, "answers")),
    ({"0", "1", "2"}, _openbackdoor),
)
