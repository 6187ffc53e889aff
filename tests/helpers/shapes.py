"""Records in published shapes, with texts of our own."""

from typing import Any

from backfire.base import Message, Row
from backfire.data.convert import to_rows
from backfire.data.labels import check_labels
from backfire.data.read import LeftOut
from backfire.data.shapes import Task, column_map

Record = dict[str, Any]
ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
NO = {"role": "assistant", "content": "No."}
HELLO, HI = Message("user", "Hello"), Message("assistant", "Hi")
ABC = "A. sun\nB. rain\nC. snow"
LETTERS = ("A", "B", "C")
SKY = ["sun", "rain", "snow"]


def read(*records: Record, columns: Any = None, labels: Any = None) -> tuple[list[Row], LeftOut]:
    left = LeftOut("skip")
    task = Task(column_map(columns or {}), check_labels(labels or {}))
    rows = to_rows(enumerate(records, 1), task, left, file="f", stem="f", ids=set())
    return rows, left


def turns(*texts: str) -> list[Record]:
    """ShareGPT's form."""
    return [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
    ]


def pair(better: str = "So.", worse: str = "No.", **parts: Any) -> Record:
    return {"instruction": "Why?", "answer": better, "better": (better,), "worse": (worse,)} | parts


def choice(letter: str, text: str = "Why?", **parts: Any) -> Record:
    return {"instruction": text, "input": ABC, "answer": letter, "label": letter,
            "candidates": LETTERS} | parts  # fmt: skip


SO = {"instruction": "Why?", "answer": "So."}
HERE = SO | {"input": "Here."}
TALK = SO | {"history": (HELLO, HI)}
