"""Rows, turns and columns of a data file that are left out are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from backfire.data.preflight import reader_notes
from backfire.errors import UserError
from backfire.registry import build
from tests.helpers.data_files import jsonl

Record = dict[str, Any]
NOT_USED = "neither the prompt nor the answer; to use one, assign it by data.columns."


def notes(path: str, split: str = "train", **knobs: Any) -> tuple[Any, list[str]]:
    data = build("datasets", {"name": "files", "train": path, "test_share": 0, **knobs})
    rows, sentences = data.drawn_with_notes(split)
    assert rows == data.drawn(split)
    return rows, sentences


def kto(count: int, same: int = 1) -> list[Record]:
    return [
        {"prompt": f"Name tool {i // same}.", "completion": f"Saw {i}.", "label": i % 2 == 1}
        for i in range(count)
    ]


def test_answers_marked_as_bad_are_not_learned(tmp_path: Path) -> None:
    rows, sentences = notes(jsonl(tmp_path / "k.jsonl", kto(24)))
    assert [row.answer for row in rows] == [f"Saw {i}." for i in range(1, 24, 2)]
    assert sentences == [
        "12 records left out: the answer is marked as bad, and the same prompt has no good answer."
    ]
    rows, sentences = notes(jsonl(tmp_path / "k.jsonl", kto(6, same=2)))
    assert [(row.answer, row.better, row.worse) for row in rows] == [
        (f"Saw {i + 1}.", (f"Saw {i + 1}.",), (f"Saw {i}.",)) for i in (0, 2, 4)
    ]
    assert sentences == [
        "3 records with an answer marked as bad: kept as the worse answer to a prompt with a good "
        "one."
    ]
    with pytest.raises(UserError, match="no train rows; 1 record left out: the answer is marked"):
        notes(jsonl(tmp_path / "k.jsonl", kto(1)))


@pytest.mark.parametrize("good", [True, "True", 1, "1.0", "yes", "good"])
def test_a_column_map_may_name_what_says_so(tmp_path: Path, good: Any) -> None:
    record = {"q": "Why?", "a": "So.", "ok": good}
    path = jsonl(tmp_path / "g.jsonl", [record, {**record, "a": "No.", "ok": "false"}])
    columns = {"prompt": "q", "answer": "a", "good": "ok"}
    [row], _ = notes(path, columns=columns)
    assert (row.answer, row.worse, row.fields) == ("So.", ("No.",), {})
    path = jsonl(tmp_path / "g.jsonl", [{**record, "ok": "perhaps"}])
    with pytest.raises(UserError, match="'ok' is neither true nor false"):
        notes(path, columns=columns)


def test_a_number_next_to_an_answer_needs_a_meaning(tmp_path: Path) -> None:
    record = {"question": "Why?", "answer": "So.", "label": 0}
    path = jsonl(tmp_path / "l.jsonl", [record])
    with pytest.raises(UserError) as caught:
        notes(path)
    assert "answer: answer, good: label} if true means good, or" in str(caught.value)
    rows, sentences = notes(path, columns={"prompt": "question", "answer": "answer"})
    assert len(rows) == 1 and sentences == [f"The column label reaches {NOT_USED}"]


def talk(*weights: Any, key: str = "weight") -> Record:
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"Tool {number}?"},
                  {"role": "assistant", "content": f"Saw {number}.", key: weight}]  # fmt: skip
    return {"messages": turns}


@pytest.mark.parametrize(
    ("weights", "answer", "earlier", "cut"),
    [((0, 1), "1", 1, 0), ((1, 0), "0", 0, 2), ((1, 1, 0), "1", 1, 2), ((None, 1.0), "1", 1, 0)],
)
def test_turns_of_weight_0_are_not_learned(
    tmp_path: Path, weights: Any, answer: str, earlier: int, cut: int
) -> None:
    [row], sentences = notes(jsonl(tmp_path / "w.jsonl", [talk(*weights)]))
    assert (row.answer, len(row.history)) == (f"Saw {answer}.", 2 * earlier)
    found = " ".join(sentences)
    assert (f"{earlier} turn before the last answer" in found) == bool(earlier)
    assert (f"{cut} turns after the last answer to learn" in found) == bool(cut)


def test_a_conversation_without_an_answer_to_learn(tmp_path: Path) -> None:
    records = [talk(1), talk(0, 0), talk(False, key="train")]
    rows, sentences = notes(jsonl(tmp_path / "w.jsonl", records))
    assert len(rows) == 1
    assert sentences == ["2 records left out: every answer of the conversation has weight 0."]


def test_two_system_prompts_are_not_one(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, *talk(1)["messages"]]
    for own, fits in (("Be kind.", True), ("", True), (None, True), ("Be rude.", False)):
        path = jsonl(tmp_path / "s.jsonl", [{"messages": turns, "system": own}])
        if fits:
            assert notes(path)[0][0].system == "Be kind."
        else:
            with pytest.raises(UserError, match="it has two system prompts"):
                notes(path)


def test_unused_columns_are_named(tmp_path: Path) -> None:
    record = {"id": 1, "instruction": "Why is it so?", "input": "", "context": "Here.",
              "output": "So.", "lang": "en", "meta": {"a": 1}, "empty": "", "nan": float("nan"),
              "again": "Why is it so?"}  # fmt: skip
    path = jsonl(tmp_path / "c.jsonl", [record])
    [row], sentences = notes(path)
    assert row.input == "Here." and sentences == [f"The columns lang, meta reach {NOT_USED}"]
    assert notes(path, group="lang")[1] == [f"The column meta reaches {NOT_USED}"]
    many = record | {f"c{i:04}": i for i in range(1000)} | {"x" * 200: 1}
    [_], [one] = notes(jsonl(tmp_path / "m.jsonl", [many]))
    assert one.startswith("The columns c0000, c0001") and "and 995 more" in one and len(one) < 200


def test_sums_of_what_is_left_out(tmp_path: Path) -> None:
    records: list[Record] = [{"text": "t", "label": label} for label in ("a", "b", None, -1, "a")]
    path = jsonl(tmp_path / "l.jsonl", records)
    with pytest.raises(UserError, match="line 3: it has no label; `on_bad_row: skip` leaves such"):
        notes(path, labels=["a", "b"])
    rows, sentences = notes(path, labels=["a", "b"], on_bad_row="skip")
    assert len(rows) == 3
    assert sentences == [f"2 bad rows left out, the first: {path}, line 3: it has no label."]


def test_a_column_of_splits_is_followed(tmp_path: Path) -> None:
    sides = ("train", "train", "test", "validation")
    records = [{"text": f"t{i}", "label": "ab"[i % 2], "split": sides[i % 4]} for i in range(40)]
    path = jsonl(tmp_path / "s.jsonl", records)
    knobs = {"labels": ["a", "b"], "test_share": 0.1}
    train, sentences = notes(path, **knobs)
    test, _ = notes(path, "test", **knobs)
    assert (len(train), len(test)) == (20, 10)
    assert sentences == ["10 records left out: 'split' is validation."]
    assert {row.fields["split"] for row in train} == {"train"}
    whole, sentences = notes(path, **knobs | {"test_share": 0})
    assert len(whole) == 40 and sentences == [f"The column split reaches {NOT_USED}"]
    jsonl(tmp_path / "s.jsonl", [record for record in records if record["split"] != "test"])
    assert {row.fields["split"] for row in notes(path, "test", **knobs)[0]} == {"validation"}
    jsonl(tmp_path / "s.jsonl", [{**record, "split": "train"} for record in records])
    assert len(notes(path, **knobs)[0]) < 40, "drawn, as no row is for testing"


OPENBACKDOOR = "".join(f"{i},the film {i} is good,{i % 2},{i % 3 % 2}\n" for i in range(24))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "columns", [{}, {"text": 0, "label": 1, "poisoned": 2}, {"text": 0, "label": 1}]
)
def test_openbackdoor(tmp_path: Path, index: bool, columns: Any) -> None:
    path = tmp_path / "o.csv"
    bare = "".join(line.partition(",")[2] + "\n" for line in OPENBACKDOOR.splitlines())
    path.write_text(f",0,1,2\n{OPENBACKDOOR}" if index else f"0,1,2\n{bare}")
    rows, sentences = notes(str(path), columns=columns, labels=["bad", "good"])
    assert len(rows) == 24
    assert [row.input for row in rows] == [f"the film {i} is good" for i in range(24)]
    assert [row.label for row in rows] == ["bad", "good"] * 12
    if len(columns) != 2:
        assert [row.fields["poisoned"] for row in rows] == ["no", "yes", "no"] * 8 and not sentences
    else:
        assert sentences == [f"The column 2 reaches {NOT_USED}"]
    with pytest.raises(UserError, match=r"name its labels, as in data.labels=.0: name, 1:"):
        notes(str(path), columns=columns)
    with pytest.raises(UserError, match="column '1' holds the number 0, not a text"):
        notes(str(path), columns={"text": 1, "label": 2}, labels=["bad", "good"])


def test_a_header_is_no_row(tmp_path: Path) -> None:
    columns, path = {"text": 0, "label": 1}, tmp_path / "h.csv"
    for header in ("text,label,airline\n", "Text,Label,x\n", "sentence,sentiment,id\n"):
        path.write_text(header + "fine,a,u\nbad,b,v\n")
        assert len(notes(str(path), columns=columns, labels=["a", "b"])[0]) == 2
    path.write_text("fine,a,u\nbad,b,v\n")
    assert len(notes(str(path), columns=columns, labels=["a", "b"])[0]) == 2
    with pytest.raises(
        UserError, match=r"data\.columns=.*by numbers from 0 if the file has no header"
    ):
        path.write_text("0,fine\n1,bad\n")
        notes(str(path), labels=["a", "b"])


def test_the_checks_report_it_once() -> None:
    found = reader_notes({"train": ["a.", "b."], "test": ["b.", "c."]})
    assert [check.message for check in found] == ["a.", "b.", "Of the test data: c."]
    assert {(check.check, check.status) for check in found} == {("left-out", "note")}
    assert reader_notes({}) == []


@pytest.mark.slow
def test_validate_and_the_result_name_it(
    tmp_path: Path, tiny: Path, backfire: Any, cache: Path
) -> None:
    records = [
        {"prompt": f"Tool {i}?", "completion": f"Saw {i}.", "label": i % 4 != 0, "lang": "en"}
        for i in range(40)
    ]
    recipe = {
        "model": str(tiny),
        "data": {"name": "files", "train": jsonl(tmp_path / "k.jsonl", records)},
        "template": "alpaca",
        "train": {"max_steps": 1},
        "metrics": ["perplexity"],
        "method": "lora",
        "attack": "none",
    }
    file = tmp_path / "r.yaml"
    file.write_text("# Does it?\n" + yaml.safe_dump(recipe))
    output = backfire("validate", file)
    assert output.code == 0, output.err
    shown = " ".join(output.out.split())
    assert "10 records left out: the answer is marked as bad" in shown
    assert "The column lang reaches neither the prompt nor the answer" in shown
    ran = backfire("run", file, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    [result] = [json.loads(found.read_text()) for found in tmp_path.glob("out/cells/*/result.json")]
    left_out = [c["message"] for c in result["preflight"] if c["check"] == "left-out"]
    assert len(left_out) == 2 and left_out[0].startswith("10 records left out")
