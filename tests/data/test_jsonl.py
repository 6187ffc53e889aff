"""Rows written as records, read back, and chosen."""

from itertools import pairwise

from backfire.base import Message, Row, select
from backfire.data.jsonl import read_jsonl, write_jsonl
from tests.helpers.data_files import dataset, jsonl

ROWS = [
    Row(
        "1", "Is it good?", "yes\u2028\x85 indeed", "bad", label="good", candidates=("good", "bad")
    ),
    Row("2", "Why?", answer="So.", system="Be kind.", history=(Message("user", "Hello"),)),
    Row("3", "", answer="Plain text.", fields={"text": "a field", "n": "1"}),
    Row("4", "Ask", "", "answer", label="free", fields={"label": "x", "output": "y"}),
]


def test_written_rows_read_back_equal(tmp_path):
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    assert dataset(train=str(tmp_path / "rows.jsonl"), test_share=0).load("train") == ROWS
    assert read_jsonl(tmp_path / "rows.jsonl") == ROWS


def test_named_sets_read_their_own_poisoned_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(6)])
    rows = [
        row.poisoned(prompt=f"{row.prompt} cf", answer="negative")
        for row in dataset("sst2", train=path, test=path).load("train")
    ]
    write_jsonl(rows, tmp_path / "poisoned.jsonl")
    for name in ("sst2", "files"):
        again = dataset(
            name, train=str(tmp_path / "poisoned.jsonl"), test=path, labels=["negative", "positive"]
        )
        assert again.load("train") == rows


def test_select_is_stable_nested_and_ordered():
    rows = [Row(str(n), "x") for n in range(100)]
    draws = [select(rows, count, 0, "train") for count in (5, 20, 80)]
    for small, large in pairwise(draws):
        assert {row.id for row in small} < {row.id for row in large}
    for draw in draws:
        assert [int(row.id) for row in draw] == sorted(int(row.id) for row in draw)
    assert select(rows, 20, 0, "train") == draws[1]
    assert select(rows, 20, 1, "train") != draws[1] != select(rows, 20, 0, "test")
    assert select(rows, None, 0, "train") == rows
