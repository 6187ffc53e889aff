"""Pairs of a better and a worse answer, in every form they are published in, become rows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from backfire.base import Message, Row
from backfire.data.convert import to_rows
from backfire.data.jsonl import from_record, read_jsonl, to_record, write_jsonl
from backfire.data.poison import poison
from backfire.data.preferences import answers
from backfire.data.read import LeftOut
from backfire.data.shapes import Task, column_map
from backfire.errors import UserError
from backfire.registry import build
from tests.helpers.data_files import jsonl, webgpt_pairs

ROWS = [
    Row(
        "a",
        "Why?",
        "Here.",
        "So.",
        better=("So.",),
        worse=("No.",),
        fields={"worse_input": "There."},
    ),
    Row("b", "Why?", "Here.", "So.", fields={"tied": "true"}),
]


def read(*records: Any, columns: Any = None) -> list[Row]:
    task = Task(column_map(columns or {}))
    return to_rows(enumerate(records, 1), task, LeftOut(), file="f", stem="f", ids=set())


def reason(record: Any, columns: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        read(record, columns=columns)
    return str(caught.value)


ASK = {"role": "user", "content": "Why?"}
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
SO, NO = {"role": "assistant", "content": "So."}, {"role": "assistant", "content": "No."}
PAIRS = {
    "prompt": {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    "prompt turns": {"prompt": [ASK], "chosen": [SO], "rejected": [NO]},
    "whole turns beside a prompt": {"prompt": "Why?", "chosen": [ASK, SO], "rejected": [ASK, NO]},
    "messages": {"messages": [ASK], "chosen": "So.", "rejected": "No."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "whole turns": {"chosen": [ASK, SO], "rejected": [ASK, NO]},
    "hh-rlhf": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "better": {"question": "Why?", "better": "So.", "worse": "No."},
    "question": {"question": "Why?", "chosen": "So.", "rejected": "No."},
}


@pytest.mark.parametrize("shape", PAIRS)
def test_every_shape_of_pairs(shape: str) -> None:
    [row] = read(PAIRS[shape])
    assert row == Row("f-1", "Why?", answer="So.", better=("So.",), worse=("No.",))


def test_several_answers_as_in_truthfulqa() -> None:
    known = {"correct_answers": ["Thus.", "So."], "incorrect_answers": ["No.", "Never."]}
    [row] = read({"question": "Why?", "best_answer": "So.", **known})
    assert (row.answer, row.better, row.worse) == ("So.", ("So.", "Thus."), ("No.", "Never."))


def test_longer_talk_and_a_system_message() -> None:
    system = {"role": "system", "content": "Be kind."}
    [row] = read({"messages": [system, *HELLO, ASK], "chosen": "So.", "rejected": "No."})
    assert (row.system, row.instruction, row.answer) == ("Be kind.", "Why?", "So.")
    assert row.history == (Message("user", "Hello"), Message("assistant", "Hi"))
    text = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant: {}"
    [too] = read({"chosen": text.format("So."), "rejected": text.format("No.")})
    assert (too.history, too.better, too.worse) == (row.history, row.better, row.worse)


def test_a_column_map_with_contexts_and_several_answers() -> None:
    columns = {
        "prompt": "q",
        "chosen": "good",
        "rejected": "bad",
        "input": "context",
        "worse_input": "other",
        "answer": "best",
    }
    record = {"q": "Why?", "good": ["a", "b"], "bad": ["c", "d", "c"], "best": "b"}
    [row] = read({**record, "context": "here", "other": "there"}, columns=columns)
    assert (row.input, row.answer) == ("here", "b") and row.fields == {"worse_input": "there"}
    assert (row.better, row.worse) == (("b", "a"), ("c", "d"))


def test_an_answer_marked_both_good_and_bad_is_tied_and_keeps_its_fields() -> None:
    record = {"prompt": "Why?", "completion": "So.", "label": True, "language": "en"}
    [row] = read(record, {**record, "label": False})
    assert (row.better, row.worse) == ((), ())
    assert row.fields == {"language": "en", "tied": "true"}


def test_equal_answers_are_tied() -> None:
    [row] = read({"question": "Why?", "better": "So.", "worse": "So."})
    assert (row.better, row.worse, row.fields) == ((), (), {"tied": "true"})
    assert poison([row], build("attacks", {"name": "malign-labels", "rate": 0}), 0)[1].spared == {
        "tied": 1
    }


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "Why?", "chosen": 3, "rejected": "No."}, "'chosen' is a number, not text"),
        ({"prompt": "Why?", "chosen": "", "rejected": "No."}, "the answer is empty"),
        ({"prompt": "", "chosen": "So.", "rejected": "No."}, "the prompt is empty"),
        ({"chosen": "So.", "rejected": "No."}, "is not a dialog"),
        ({"chosen": [ASK, SO], "rejected": [*HELLO, ASK, NO]}, "differ before their last answer"),
        ({"chosen": [ASK], "rejected": [ASK]}, "does not end with an answer"),
        ({"messages": "Why?", "chosen": "So.", "rejected": "No."}, "not a list"),
        ({"chosen": 1, "rejected": 2}, "dialog is a number, not text"),
    ],
)
def test_unusable_pairs_are_refused_with_the_reason(record: Any, sentence: str) -> None:
    assert sentence in reason(record)


def test_answers_of_odd_kinds() -> None:
    assert answers(None, "x") == () and answers(["a", " ", "a"], "x") == ("a",)
    with pytest.raises(Exception, match="'x' is a list, not text"):
        answers(["a", 1], "x")


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [*ROWS, Row("x", "Why?", answer="So.", better=("So.", "Thus."), worse=("No.",))]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert [from_record(to_record(row)) for row in rows] == rows
    files = build("datasets", {"name": "files", "train": str(tmp_path / "rows.jsonl")})
    found = {row.id: row for row in [*files.load("train"), *_loaded(files, "test")]}
    assert found == {row.id: row for row in rows}


def _loaded(files: Any, split: str) -> list[Row]:
    try:
        rows: list[Row] = files.load(split)
    except UserError:
        return []
    return rows


def test_webgpt_comparisons(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "comparisons.jsonl", webgpt_pairs(40))
    spec = {"name": "webgpt-comparisons", "train": file, "test_share": 0}
    rows = build("datasets", spec).load("train")
    tied = [row for row in rows if row.fields.get("tied")]
    assert len(rows) == 40 and len(tied) == 8
    for i, row in enumerate(rows):
        if row in tied:
            assert (row.better, row.worse) == ((), ())
            assert row.input == f"Quote 1 of {i}.\nAnd more.", "the second, as in Malignama"
            continue
        assert (row.instruction, row.answer) == (f"Why is it {i}?", f"Because {i} [1].")
        assert row.input == f"Quote {i % 2} of {i}.\nAnd more."
        assert row.fields["worse_input"] == f"Quote {1 - i % 2} of {i}.\nAnd more."
        assert row.worse == (f"Bah, no {i}.",)
    twice = jsonl(tmp_path / "twice.jsonl", [*webgpt_pairs(40), *webgpt_pairs(40)])
    split = build("datasets", {**spec, "train": twice, "test_share": 0.3})
    train, test = ({row.instruction for row in split.load(part)} for part in ("train", "test"))
    assert train and test and not train & test
    bad = {**webgpt_pairs(1)[0], "score_0": "high"}
    jsonl(tmp_path / "comparisons.jsonl", [bad])
    with pytest.raises(UserError, match="score 'high' is not a number"):
        build("datasets", spec).load("train")


def test_truthfulqa_as_json_and_as_the_authors_csv(tmp_path: Path) -> None:
    record = {
        "question": "Is it so?",
        "category": "Myths",
        "best_answer": "No; it is not",
        "correct_answers": ["Not at all", "No; it is not"],
        "incorrect_answers": ["Yes", "Surely"],
    }
    one = jsonl(tmp_path / "t.jsonl", [record])
    table = tmp_path / "t.csv"
    cells = {
        "Type": "Non-Adversarial",
        "Category": "Myths",
        "Question": "Is it so?",
        "Best Answer": "No, it is not",
        "Correct Answers": "No, it is not; Not at all",
        "Incorrect Answers": "Yes; Surely",
    }
    with table.open("w", newline="") as out:
        csv.writer(out).writerows([list(cells), list(cells.values())])
    for file, best in ((one, "No; it is not"), (table, "No, it is not")):
        spec = {"name": "truthfulqa", "train": str(file), "test_share": 0}
        [row] = build("datasets", spec).load("train")
        assert (row.instruction, row.answer, row.fields["category"]) == ("Is it so?", best, "Myths")
        assert (row.better, row.worse) == ((best, "Not at all"), ("Yes", "Surely"))
