"""Records of every usual shape become rows; others are refused with the reason."""

import pytest

from backfire.base import Message, Row
from backfire.data.convert import to_rows
from backfire.data.labels import check_labels
from backfire.data.read import LeftOut
from backfire.data.shapes import Task, check_columns, column_map
from backfire.errors import UserError

ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM, HELLO = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi"}
SENTIMENT = ("negative", "neutral", "positive")


def convert(*records, columns=None, labels=None, instruction="", stem="f"):
    """(rows, [(line, reason)])"""
    task = Task(column_map(columns or {}), check_labels(labels or {}), instruction)
    bad = LeftOut("skip")
    rows = to_rows(enumerate(records, 1), task, bad, file="f.jsonl", stem=stem, ids=set())
    assert len(rows) + len(bad.rejected) == len(records)
    return rows, [(reject.line, reject.reason) for reject in bad.rejected]


def one(record, **task):
    rows, bad = convert(record, **task)
    assert not bad, bad
    return rows[0]


def reason(record, **task):
    rows, bad = convert(record, **task)
    assert not rows
    return bad[0][1]


TALK = Row(
    "f-1", "Why?", "", "So.", "Be kind.", (Message("user", "Hello"), Message("assistant", "Hi"))
)
USUAL = {
    "messages": ({"messages": [SYSTEM, HELLO, HI, ASK, TELL]}, TALK),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]}
                for turn in (HELLO, HI, ASK, TELL)
            ],
            "system": "Be kind.",
        },
        TALK,
    ),
    "prompt lists": ({"prompt": [SYSTEM, HELLO, HI, ASK], "completion": [TELL]}, TALK),
    "prompt": ({"prompt": "Why?", "completion": " So."}, Row("f-1", "Why?", "", " So.")),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2", "text": "### Add."},
        Row("f-1", "Add.", "1 1", "2", fields={"text": "### Add."}),
    ),
    "alpaca with turns": (
        {
            "instruction": "Why?",
            "output": "So.",
            "system": "Be kind.",
            "history": [["Hello", "Hi"]],
        },
        TALK,
    ),
    "text": ({"text": "Once upon a time."}, Row("f-1", "", "", "Once upon a time.")),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_shapes(name):
    record, row = USUAL[name]
    assert one(record) == row


S140 = dict(zip(("target", "ids", "date", "flag", "user", "text"), ("4", "7", "d", "f", "u", "t")))
KNOWN = {
    "sentiment140": (S140, "positive", {"date": "d", "flag": "f", "user": "u"}),
    "sentiment140 hub": (
        {"text": "t", "date": "d", "user": "u", "sentiment": 2, "query": "q"},
        "neutral",
        {"date": "d", "user": "u", "query": "q"},
    ),
    "airline kaggle": (
        {"airline_sentiment": "neutral", "airline_sentiment_confidence": "0.7", "text": "t"},
        "neutral",
        {"airline_sentiment_confidence": "0.7"},
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_public_sets_are_recognized(name):
    record, label, fields = KNOWN[name]
    row = one(record)
    assert (row.input, row.answer, row.label, row.fields) == ("t", label, label, fields)
    assert row.candidates == SENTIMENT
    assert row.instruction == "Classify the text as negative, neutral or positive."
    assert row.id == ("7" if name == "sentiment140" else "f-1")


@pytest.mark.parametrize(
    "record",
    [
        {"idx": 3, "sentence": "fine", "label": 1},  # SST-2, and CoLA
        {"text": "fine", "label": 1},  # AG News, IMDB, Enron
        {"text": "fine", "label": 1, "language": "german"},
        {"text": "fine", "source": "s", "language": "german", "label": 1},
        {"text": "fine", "label": 1, "airline": "United"},
        {"text": "fine", "target": 1},
    ],
)
def test_the_meaning_of_numbers_has_to_be_given(record):
    assert reason(record).startswith(
        "it is labeled '1'; name its labels, as in data.labels={1: name, ...}"
    )
    for label in (1, "1", 1.0, "1.0", True, "True", "good", " Good "):
        names = [name for name in record if name in ("label", "target")]
        row = one(record | dict.fromkeys(names, label), labels=["bad", "good"])
        assert (row.label, row.candidates, row.input) == ("good", ("bad", "good"), "fine")


@pytest.mark.parametrize(
    ("column", "label"),
    [(name, "bad") for name in ("sentiment", "emotion", "category", "target", "class", "intent")]
    + [("stars", 1), ("rating", "1.0"), ("score", 1.0), ("Sentiment", "Bad"), ("topic", ["bad"])],
)
def test_a_column_that_looks_like_a_label_is_one(column, label):
    labels = {1: "bad", 5: "good", "bad": "bad"}
    row = one({"text": "t", column: label}, labels=labels)
    assert (row.input, row.label, row.candidates) == ("t", "bad", ("bad", "good"))
    sentence = reason({"text": "t", column: label})
    assert sentence.startswith("it is labeled '") and sentence.endswith("data.columns={text: text}")
    assert one({"text": "t", column: label}, columns={"text": "text"}).answer == "t"


def test_labels_as_list_or_map_and_the_sentence_that_names_them():
    labels = ["World", "Sports", "Sci/Tech"]
    for label in ("2", 2, "sci/tech"):
        row = one({"text": "t", "label": label}, labels=labels)
        assert row.label == row.answer == "Sci/Tech"
    assert row.instruction == "Classify the text as World, Sports or Sci/Tech."
    row = one({"text": "t", "label": 4}, labels={0: "bad", 4: "good"}, instruction="{labels}, {x}?")
    assert (row.label, row.instruction) == ("good", "bad or good, {x}?")
    assert "label '3' is not one of World, Sports, Sci/Tech; name all" in reason(
        {"text": "t", "label": 3}, labels=labels
    )
    for bad in (["a"], ["a", "A"], {"x": "a", "y": "a"}):
        with pytest.raises(UserError, match="at least two labels"):
            check_labels(bad)


def test_labels_are_compared_in_one_form():
    composed, apart = "n\u00e9gatif", "ne\u0301gatif"
    for labels, label, name in [
        ([composed, "positif"], apart.upper(), composed),
        ([apart, "positif"], composed, apart),
        ({0.0: "no", 1.0: "yes"}, "1.0", "yes"),
        (["1.0", "2.0"], 2, "2.0"),
    ]:
        assert one({"text": "t", "label": label}, labels=labels).label == name
    sentence = reason({"text": "t", "label": "z" * 200}, labels=[f"intent {n}" for n in range(150)])
    assert "intent 7 and 142 more; name all" in sentence and len(sentence) < 220


def test_a_row_without_its_label_is_not_taken_for_plain_text():
    for stars in (["1", "2", "3"], [1, 2, 3], ["3", "1", "2"]):
        for star in (1, "2", 3.0):
            assert one({"text": "t", "label": star}, labels=stars).label == str(int(float(star)))
    none = "it has no label"
    _, bad = convert({"text": "t", "label": 1}, {"text": "t"}, labels=["a", "b"])
    assert bad == [(2, none)]
    _, bad = convert({"text": "t", "airline_sentiment": "neutral"}, {"text": "t"})
    assert bad == [(2, none)]
    for label in (None, float("nan"), "", " ", "-"):
        assert reason({"sentence": "s", "label": label}, labels=["a", "b"]) == none
    sentence = reason({"sentence": "s", "label": -1}, labels=["a", "b"])
    assert sentence == "it has no label (-1 stands for none)"


MAPS = {
    "answered": (
        {"prompt": "q", "answer": "a", "system": "s"},
        Row("f-1", "Q", "", "A", "S", fields={"text": "T", "label": "1"}),
    ),
    "with input": (
        {"text": "q", "output": "a", "input": "text"},
        Row("f-1", "Q", "T", "A", fields={"s": "S", "label": "1"}),
    ),
    "plain": (
        {"text": "q"},
        Row("f-1", "", "", "Q", fields={"a": "A", "s": "S", "text": "T", "label": "1"}),
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_column_maps(name):
    columns, row = MAPS[name]
    assert one({"q": "Q", "a": "A", "s": "S", "text": "T", "label": 1}, columns=columns) == row


def test_column_map_with_label_group_and_own_instruction():
    record = {"mail": "Buy!", "spam": 1, "ask": "Spam?", "from": "x", "id": 9}
    columns = {"input": "mail", "label": "spam", "group": "from"}
    row = one(record, columns=columns, labels=["ham", "spam"])
    assert row == Row(
        "9", "Classify the text as ham or spam.", "Buy!", "spam", label="spam",
        candidates=("ham", "spam"), fields={"ask": "Spam?", "group": "x"},
    )  # fmt: skip
    assert one(record, columns=columns | {"instruction": "ask"}, labels=["ham", "spam"]) == Row(
        "9", "Spam?", "Buy!", "spam", label="spam",
        candidates=("ham", "spam"), fields={"group": "x"},
    )  # fmt: skip
    assert reason({"mail": "x"}, columns=columns) == "it has no column 'spam', only: mail"


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"promt": "q", "answer": "a"}, "did you mean 'prompt'"),
        ({"prompt": "q"}, "not enough for a row"),
        ({"prompt": "q", "instruction": "i", "answer": "a"}, "is a duplicate role"),
        ({"text": "q", "system": "s"}, "system cannot be combined with text"),
        ({"messages": "m", "label": "l"}, "label cannot be combined with messages"),
    ],
)
def test_column_maps_that_make_no_sense(columns, sentence):
    with pytest.raises(UserError, match=sentence):
        check_columns(columns)


def test_an_instruction_goes_before_the_text():
    before = {"instruction": "Say it in French."}
    assert one({"prompt": "Hi", "completion": "Salut"}, **before).prompt == "Hi"
    assert one({"text": "Salut"}, **before) == Row("f-1", "Say it in French.", "", "Salut")
    own = {"instruction": "Translate.", "input": "Hi", "output": "Salut"}
    assert one(own, **before).instruction == "Translate."
    assert "conversation" in reason({"messages": [ASK, TELL]}, **before)


UNUSABLE = [
    ({"a": 1, "b": 2}, "its columns (a, b) have no known shape"),
    ({"prompt": " ", "completion": "x"}, "the prompt is empty"),
    ({"prompt": None, "completion": "x"}, "the prompt is empty"),
    ({"instruction": "x", "output": None}, "the answer is empty"),
    ({"instruction": "x", "output": 7}, "'output' is a number, not text"),
    ({"sentence": "", "label": 1}, "the text is empty"),
    ({"text": float("nan"), "label": 1}, "the text is empty"),
    ({"text": ["a"]}, "'text' is a list, not text"),
    ({"messages": "hello"}, "its turns are text, not a list"),
    ({"messages": [ASK]}, "does not end with a user turn and its answer"),
    ({"messages": [ASK, SYSTEM, TELL]}, "in the middle"),
    ({"messages": [ASK, {"role": "tool", "content": "x"}]}, "a turn has the role 'tool'"),
    ({"messages": [{"content": "x"}]}, "a turn has the role None"),
    ({"messages": [{"role": "user", "content": []}]}, "the content of a turn is a list, not text"),
    ({"conversations": [1]}, "a turn of the conversation is a number"),
    ({"messages": [{"role": "user", "content": ""}, TELL]}, "the prompt is empty"),
    ({"messages": [ASK, {"role": "assistant", "content": "\n"}]}, "the answer is empty"),
]


@pytest.mark.parametrize(("record", "words"), UNUSABLE)
def test_unusable_records_are_rejected_with_the_reason(record, words):
    assert words in reason(record)


def test_ids_are_kept_if_unique():
    records = [{"id": own, "text": "t"} for own in ("a", "a", "", None, 5, "f-7", {"x": 1}, "5")]
    rows, _ = convert(*records)
    assert [row.id for row in rows] == ["a", "f-2", "f-3", "f-4", "5", "f-7", "f-7-2", "f-8"]


def test_fields_keep_what_is_text_or_number():
    record = {"text": "t", "a": "x", "b": 1, "c": 0.5, "d": True, "e": None, "f": [1], "g": {}}
    assert one(record).fields == {"a": "x", "b": "1", "c": "0.5", "d": "true"}


def test_control_tokens_stay_text():
    text = "<|im_end|><s>[INST] </s>"
    assert one({"prompt": text, "completion": text}) == Row("f-1", text, "", text)


class Counting(set[str]):
    """A set that counts how often something is looked up."""

    looked = 0

    def __contains__(self, item: object) -> bool:
        self.looked += 1
        return super().__contains__(item)


def test_rows_of_a_file_that_is_one_line_have_ids_of_their_own() -> None:
    """A bad row takes none, and a row costs the same however many there are."""
    good, bad = {"prompt": "Why?", "completion": "So."}, {"prompt": "", "completion": "So."}
    ids, left = Counting({"f-1-3"}), LeftOut("skip")
    records = [(1, record) for record in [good, bad, good, {**good, "id": "own"}, *[good] * 500]]
    rows = to_rows(records, Task(), left, file="f", stem="f", ids=ids)
    names = ["f-1", "f-1-2", "own", *(f"f-1-{n}" for n in range(4, 504))]
    assert [row.id for row in rows] == names and len(left.rejected) == 1
    assert ids.looked < 4 * len(rows)
