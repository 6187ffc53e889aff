"""Right choices, scores, lists and columns that are easily misread."""

import json
from pathlib import Path
from typing import Any

import pytest

from backfire.data.convert import to_rows
from backfire.data.preflight import _balance
from backfire.data.questions import right_one
from backfire.data.read import BadRowError, LeftOut, records
from backfire.data.shapes import Task
from backfire.errors import UserError
from backfire.registry import build

Record = dict[str, Any]
FOUR = ["No.", "Maybe.", "So.", "Yes."]
NUMBERS = ["1", "0", "2", "3"]


def read(record: Record, **task: Any) -> tuple[Any, LeftOut]:
    left = LeftOut()
    return to_rows([(1, record)], Task(**task), left, file="f", stem="f", ids=set()), left


@pytest.mark.parametrize(("key", "place"), [(0, 0), (1, 1), (3.0, 3), ("3", 3), ("B", 1), ("d", 3)])
def test_a_number_is_a_place_and_never_a_text(key: Any, place: int) -> None:
    assert right_one(list("ABCD"), NUMBERS, key) == place


@pytest.mark.parametrize("key", ["0", "1"])
def test_a_number_in_quotes_that_may_be_either_is_not_guessed(key: str) -> None:
    with pytest.raises(BadRowError, match="text of one choice and the number of another"):
        right_one(list("ABCD"), NUMBERS, key)


def test_letters_that_are_numbers_come_first() -> None:
    assert right_one(list("1234"), FOUR, 1) == right_one(list("1234"), FOUR, "1") == 0


# Set: (its record, the prompt, the right letter)
CHOICES: dict[str, tuple[Record, str, str]] = {
    "cais/mmlu": ({"question": "Why?", "choices": NUMBERS, "answer": 0}, "Why?", "A"),
    "reclor": (
        {"context": "It is.", "question": "Why?", "answers": FOUR, "label": 2, "id_string": "t"},
        "Why?", "C",
    ),
    "textmachinelab/quail": (
        {"context": "It is.", "question": "Why?", "answers": FOUR, "correct_answer_id": 1},
        "Why?", "B",
    ),
    "allenai/cosmos_qa": (
        {"context": "It is.", "question": "Why?", "label": 3,
         **{f"answer{i}": text for i, text in enumerate(FOUR)}},
        "Why?", "D",
    ),
    "lucasmccabe/logiqa": (
        {"context": "It is.", "query": "Why?", "options": FOUR, "correct_option": 1}, "Why?", "B",
    ),
    "aps/super_glue copa": (
        {"premise": "It is.", "choice1": "No.", "choice2": "So.", "question": "cause", "label": 1},
        "It is. What is the cause?", "B",
    ),
    "openlifescienceai/medmcqa, as a table": (
        {"question": "Why?", "opa": "1", "opb": "2", "opc": "3", "opd": "", "cop": "1"},
        "Why?", "B",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_the_right_choice(name: str) -> None:
    record, prompt, letter = CHOICES[name]
    [row], left = read(record)
    assert (row.instruction, row.answer, row.label) == (prompt, letter, letter)
    assert ("It is." in row.instruction + row.input) == ("It is." in record.values())
    assert set(left.columns) <= {"id_string"}


def test_a_gap_between_choices_does_not_move_the_right_one() -> None:
    with pytest.raises(UserError, match="'opb' is empty"):
        read({"question": "Why?", "opa": "1", "opb": "", "opc": "3", "opd": "4", "cop": 2})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "\n\nHuman: Hi.\n\nAssistant: Oh.\n\nHuman: Why?\n\nAssistant: ",
         "answers": [{"answer": "So.", "rank": 1.0}, {"answer": "No.", "rank": 2.0}]},
        {"prompt": "\n\nHuman: Hi.\n\nAssistant: Oh.\n\nHuman: Why?\n\nAssistant:",
         "response": " So.", "chosen": "So.", "rejected": "No."},
    ],
)  # fmt: skip
def test_a_dialog_as_one_text_is_a_prompt_in_turns(record: Record) -> None:
    [row], _ = read(record)
    assert [turn.content for turn in row.history] == ["Hi.", "Oh."]
    assert (row.instruction, row.better, row.worse) == ("Why?", ("So.",), ("No.",))


# Set: (its record, words of the reason)
REASONS: dict[str, tuple[Record, str]] = {
    "nvidia/Aegis": (
        {"prompt": "Why?", "response": "So.", "prompt_label": "safe", "response_label": "unsafe"},
        "good: response_label",
    ),
    "walledai/AdvBench": (
        {"prompt": "Why?", "target": "Sure, here is"},
        "data.columns={prompt: prompt, answer: target}",
    ),
    "CarperAI tl;dr": (
        {"prompt": "Post.", "label": "Short."}, "data.columns={prompt: prompt, answer: label}"
    ),
    "stsb": ({"sentence1": "a.", "sentence2": "b.", "label": 4.4}, "are scores, not labels"),
    "hatexplain": ({"text": "Here.", "label": {"a": 1}}, "'label' is an object, not one label"),
    "rajpurkar/squad_v2": (
        {"context": "It is.", "question": "Why?", "answers": {"text": [], "answer_start": []}},
        "the answer is empty; `on_bad_row: skip` leaves",
    ),
    "a number that is none": (
        {"question": "Why?", "choices": ["sun", "rain"], "answer": "²"},
        "'²' is not one of its 2 choices",
    ),
    "winogrande, the same": (
        {"sentence": "Why?", "option1": "sun", "option2": "rain", "answer": "²"},
        "'²' is not one of its 2 choices",
    ),
    "Salesforce/wikitext": ({"text": ""}, "the text is empty; `on_bad_row: skip` leaves"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_shows_what_to_write(name: str) -> None:
    record, words = REASONS[name]
    with pytest.raises(UserError) as caught:
        read(record)
    assert words in str(caught.value) and len(str(caught.value)) < 250


def test_no_column_is_named_that_the_file_lacks() -> None:
    with pytest.raises(UserError) as caught:
        read({"stars": 4, "review_title": "Oh", "review_body": "Here."})
    assert "text" not in str(caught.value).partition("labels: {")[2]


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"passage": "It is.", "question": "Why?", "answers_spans": {"spans": ["So.", "No."],
          "types": ["span"]}}, "Why?It is.", "So."),
        ({"Body": "It is.", "Question": "Why?", "Answer": "So."}, "Why?It is.", "So."),
        ({"documents": "It is.", "tldr": "So.", "title": "t", "score": 3.0},
         "Summarize the text.It is.", "So."),
    ],
)  # fmt: skip
def test_what_the_prompt_needs_is_in_it(record: Record, prompt: str, answer: str) -> None:
    [row], _ = read(record)
    assert (row.instruction + row.input, row.answer) == (prompt, answer)


def test_a_numeric_answer_is_learned_if_the_user_names_it() -> None:
    record = {"question": "2 + 2?", "answer": 4}
    with pytest.raises(
        UserError, match="is a number, not text; to learn the number, name the columns"
    ):
        read(record)
    [row], _ = read(record, columns={"instruction": "question", "answer": "answer"})
    assert row.answer == "4"


def test_news_as_a_table_with_class_numbers() -> None:
    record = {"Class Index": "3", "Title": "Oh", "Description": "Here."}
    [row], left = read(record, labels={"3": "Business", "4": "Science"})
    assert (row.input, row.label, dict(left.columns)) == ("Oh\n\nHere.", "Business", {})


def test_validation_rows_do_not_vanish_from_a_file_of_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({name: [{"text": "Here."}] for name in ("train", "validation")}))
    with pytest.raises(UserError, match=r"several lists of rows \(train, validation\)"):
        list(records(path))


def test_a_cell_may_be_longer_than_a_book_chapter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "x " * 200_000 + ",1\n")
    [(_, record)] = records(path)
    assert len(record["text"]) == 400_000


@pytest.mark.parametrize("name", ["Split", "split_name"])
def test_a_column_of_splits_is_recognized_in_any_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"Film {i}.", name: ["Train", "TEST"][i % 4 == 0]})
                            + "\n" for i in range(40)))  # fmt: skip
    data = build("datasets", {"name": "files", "train": str(path)})
    assert [len(data.load(split)) for split in ("train", "test")] == [30, 10]
    assert data.drawn_with_notes("train")[1] == []


def test_compressed_files_are_recognized(tmp_path: Path) -> None:
    for magic, what in [(b"BZh9", "bzip2"), (b"\xfd7zX", "xz"), (b"\x28\xb5\x2f\xfd", "Zstandard")]:
        (tmp_path / "a.csv").write_bytes(magic + b"\0\1")
        with pytest.raises(UserError, match=what):
            list(records(tmp_path / "a.csv"))


def test_labels_from_1_under_a_list_show_that_none_has_the_first(tmp_path: Path) -> None:
    path = tmp_path / "stars.jsonl"
    path.write_text("".join(json.dumps({"text": f"Film {i}.", "stars": 1 + i % 4}) + "\n"
                            for i in range(40)))  # fmt: skip
    data = build(
        "datasets", {"name": "files", "train": str(path), "labels": ["a", "b", "c", "d", "e"]}
    )
    check = _balance(data.load("train"))
    assert check.status == "note"
    assert check.message.endswith("No training row has the label a.")
