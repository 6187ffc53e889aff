"""The `files` data set: local files, splits, fingerprints, and whatever JSON can hold."""

import logging

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backfire.data.convert import READER
from backfire.data.jsonl import write_jsonl
from backfire.errors import UserError
from backfire.registry import build
from tests.helpers.data_files import dataset, jsonl

ALPACA = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(400)]


def test_train_and_test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "one.jsonl", ALPACA[:3])
    jsonl(tmp_path / "two.jsonl", ALPACA[3:5])
    data = dataset(train=["one.jsonl", "two.jsonl"], test="two.jsonl")
    assert [row.answer for row in data.load("train")] == ["0", "1", "2", "3", "4"]
    assert [row.id for row in data.load("train")] == ["one-1", "one-2", "one-3", "two-1", "two-2"]
    assert [row.answer for row in data.load("test")] == ["3", "4"]


def test_files_of_one_name_give_different_ids(tmp_path):
    (tmp_path / "b").mkdir()
    paths = [jsonl(tmp_path / "t.jsonl", ALPACA[:2]), jsonl(tmp_path / "b/t.jsonl", ALPACA[:2])]
    assert [row.id for row in dataset(train=paths).load("train")] == [
        "t-1",
        "t-2",
        "t-1-2",
        "t-2-2",
    ]


def test_a_share_is_set_apart_by_prompt(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ALPACA + ALPACA[:50])
    splits = {split: dataset(train=path).load(split) for split in ("train", "test")}
    assert len(splits["train"]) + len(splits["test"]) == 450
    assert 20 < len(splits["test"]) < 70
    assert not {row.prompt for row in splits["train"]} & {row.prompt for row in splits["test"]}
    assert dataset(train=path).load("test") == splits["test"]
    assert dataset(train=path, seed=1).load("test") != splits["test"]
    # A larger share holds the smaller one, and none means none.
    assert set(map(str, splits["test"])) < set(
        map(str, dataset(train=path, test_share=0.3).load("test"))
    )
    assert len(dataset(train=path, test_share=0).load("train")) == 450
    with pytest.raises(UserError, match=r"no test rows .a test share of 0 of 450 rows.; set"):
        dataset(train=path, test_share=0).load("test")


def test_bad_rows_fail_or_are_left_out(tmp_path, caplog):
    path = jsonl(
        tmp_path / "a.jsonl", [ALPACA[0], {"instruction": "x", "output": ""}, 7, ALPACA[1]]
    )
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 2: the answer is empty; `on_bad_row: skip` leaves"
    ):
        dataset(train=path, test_share=0).load("train")
    data = dataset(train=path, test_share=0, on_bad_row="skip")
    rows, left = data.read("train")
    assert len(rows) == 2
    assert [(reject.line, reject.file) for reject in left.rejected] == [(2, path), (3, path)]
    with caplog.at_level(logging.WARNING):
        data.load("train")
        data.load("train")
    assert caplog.text.count("2 bad rows left out, the first: ") == 1, "once, however often read"
    only_bad = jsonl(tmp_path / "b.jsonl", [{"instruction": "x", "output": ""}])
    with pytest.raises(UserError, match=r"no train rows; the first bad one: .*line 1: the answer"):
        dataset(train=only_bad, on_bad_row="skip").load("train")


def test_errors_are_one_sentence(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ALPACA)
    for knobs, sentence in [
        ({}, "dataset 'files': set `train` to the path of a file"),
        ({"train": "missing.csv"}, "dataset 'files': No such file: missing.csv"),
        ({"train": path, "group": "languge"}, "no row has the field 'languge'"),
        ({"train": path, "columns": {"text": "txt"}}, "line 1: it has no column 'txt'"),
        ({"train": path, "columns": {"txt": "a"}}, "did you mean 'text'"),
        ({"train": path, "labels": ["one"]}, "at least two labels"),
        ({"train": path, "labels": [None, "2"]}, "labels.0"),
        ({"train": path, "labels": [["1"], "2"]}, "labels.0"),
        ({"train": path, "columns": {"text": ["a"]}}, "columns.text"),
        ({"train": path, "test_share": 1.0}, "test_share"),
        ({"train": path, "trian": path}, "did you mean 'train'"),
        ({"train": path, "on_bad_row": "ignore"}, "on_bad_row"),
    ]:
        with pytest.raises(UserError, match=sentence) as caught:
            dataset(**knobs).load("train")
        assert "\n" not in str(caught.value)


def test_yaml_round_trip_and_equal_spellings():
    spec = yaml.safe_load(
        "{name: files, train: a.csv, labels: {0: bad, 4: good}, columns: {text: 5, label: 0}}"
    )
    data = build("datasets", spec)
    assert build("datasets", yaml.safe_load(yaml.safe_dump(data.spec()))) == data
    assert dataset(labels=["a", "b"]).spec() == dataset(labels={0: "a", 1: "b"}).spec()


def test_truth_values_that_yaml_makes(tmp_path):
    path = tmp_path / "a.csv"
    for cells, labels in [
        ("Yes No", "{No: ham, Yes: spam}"),
        ("yes no", '{"no": ham, "yes": spam}'),
        ("True False", "{false: ham, true: spam}"),
        ("True False", "[ham, spam]"),
        ("on off", "{off: ham, on: spam}"),
        ("1.0 0.0", "[ham, spam]"),
        ("1 0", "{0: ham, 1: spam}"),
    ]:
        path.write_text("text,label\n" + "".join(f"t,{cell}\n" for cell in cells.split()))
        knobs = {"labels": yaml.safe_load(labels), "test_share": 0}
        rows = dataset(train=str(path), **knobs).load("train")
        assert [row.label for row in rows] == ["spam", "ham"], (cells, labels)
    for labels in ("[No, Yes]", "{0: No, 1: Yes}"):
        with pytest.raises(UserError, match=r'in quotes, as in labels: \["no", "yes"\]'):
            dataset(train=str(path), labels=yaml.safe_load(labels))


def test_table_without_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("4,7,good\n0,8,bad\n")
    columns, labels = {"text": 2, "label": 0, "id": 1}, {0: "no", 4: "yes"}
    rows = dataset(train=str(path), columns=columns, labels=labels, test_share=0).load("train")
    assert [(row.id, row.input, row.label) for row in rows] == [
        ("7", "good", "yes"),
        ("8", "bad", "no"),
    ]


def test_fingerprint_follows_the_bytes(tmp_path, monkeypatch):
    path, other = jsonl(tmp_path / "a.jsonl", ALPACA), jsonl(tmp_path / "b.jsonl", ALPACA)
    first = dataset(train=path).fingerprint()
    assert dataset(train=other).fingerprint() == first
    assert dataset(train=path, test=other).fingerprint() != first
    assert (
        dataset(test=path, train=other).fingerprint()
        == dataset(train=path, test=other).fingerprint()
    )
    jsonl(tmp_path / "a.jsonl", ALPACA[1:])
    assert dataset(train=path).fingerprint() != first
    assert dataset("sst2").fingerprint() != dataset("sst2", revision="abc").fingerprint()
    assert dataset("sst2", train=other).fingerprint() == first
    for spec in ({"train": path}, {"name": "sst2"}):
        before = dataset(**spec).fingerprint()
        monkeypatch.setattr("backfire.datasets.files.READER", READER + 1)
        assert dataset(**spec).fingerprint() != before, "the same bytes, read in another way"
        monkeypatch.undo()
    with pytest.raises(UserError, match="No such file"):
        dataset(train="none.csv").fingerprint()


KEYS = st.sampled_from(
    [
        "messages",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "text",
        "label",
        "language",
        "id",
        "fields",
        "candidates",
        "history",
        # and those of public sets
        *("question context answer answers choices answerKey paragraphs title premise hypothesis "
          "sentence1 sentence2 chosen rejected better worse conversations system_prompt is_correct "
          "response_0 response_1 better_response_id human_ref_A human_ref_B labels mc1_targets "
          "definition instances goal sol1 sol2 sentence option1 option2 endings ctx tools images "
          "article summary 0 1 2 split sentiment stars").split(),
    ]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "role", "content", "positive"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            ["role", "content", "from", "value", "text", "label", "weight", "labels", "choices",
             "context", "qas", "input", "output", "score"]
        ),
        inner,
        max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=st.lists(st.dictionaries(KEYS, VALUES, max_size=6), min_size=1, max_size=4))
def test_no_records_lead_to_a_traceback(tmp_path, records):
    path = jsonl(tmp_path / "a.jsonl", records)
    for knobs in (
        {},
        {"labels": ["negative", "positive"]},
        {"columns": {"prompt": "text", "answer": "output"}},
    ):
        try:
            rows, left = dataset(train=path, test_share=0, on_bad_row="skip", **knobs).read("train")
        except UserError as error:
            assert "there are no train rows" in str(error)
            continue
        assert len(rows) + len(left.rejected) + left.records.total() == len(records)
        assert len({row.id for row in rows}) == len(rows)
        assert all((row.prompt.strip() or not row.prompt) and row.answer.strip() for row in rows)
        write_jsonl(rows, tmp_path / "again.jsonl")
        assert dataset(train=str(tmp_path / "again.jsonl"), test_share=0).load("train") == rows
