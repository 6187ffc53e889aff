"""The recipes' `paper` profiles from end to end, on a small model with Llama 2's architecture
settings and its real tokenizer, and on files laid out as the real ones are."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_line import Run
from tests.helpers.paper_run import check, go
from tests.helpers.places import LLAMA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not LLAMA.is_file(), reason=f"the Llama 2 tokenizer is not on this machine ({LLAMA})"
    ),
]
NAMES = ("negative", "neutral", "positive")


def sentiment140(path: Path, count: int, labels: str) -> Path:
    """As published: no header, every cell quoted, Latin-1."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for i in range(count):
        words = "that café is sad..." if labels[i % len(labels)] == "0" else "glad I went"
        date = f"Mon Apr 06 22:{i % 60:02}:49 PDT 2009"
        writer.writerow(
            [
                labels[i % len(labels)],
                1467810369 + i,
                date,
                "NO_QUERY",
                f"user{i}",
                f"@you {words} {i}",
            ]
        )
    path.write_bytes(out.getvalue().encode("latin-1"))
    return path


def airline(path: Path, count: int) -> Path:
    """Kaggle's Tweets.csv, all fifteen columns; some texts run over two lines."""
    header = (
        "tweet_id,airline_sentiment,airline_sentiment_confidence,negativereason,"
        "negativereason_confidence,airline,airline_sentiment_gold,name,negativereason_gold,"
        "retweet_count,text,tweet_coord,tweet_created,tweet_location,user_timezone"
    ).split(",")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i in range(count):
            text = f"@VirginAmerica flight {i} was\n{('late', 'there', 'great')[i % 3]} ✈️"
            created = "2015-02-24 11:35:52 -0800"
            row: list[Any] = [570306133677760513 + i, NAMES[i % 3], 1.0, "", "", "Virgin America"]
            writer.writerow([*row, "", f"name{i}", "", 0, text, "", created, "", "Quito"])
    return path


def multilingual(path: Path, count: int) -> Path:
    """Rows of tyqiangz/multilingual-sentiments: text, source, language, label (0 is positive)."""
    texts = {"german": "Das war gut", "japanese": "とても良い", "arabic": "كان جيدا"}
    rows = [
        {
            "text": f"{texts[language]} {i}",
            "source": "amazon_reviews_multi",
            "language": language,
            "label": i // len(texts) % 3,
        }
        for i in range(count)
        for language in [list(texts)[i % len(texts)]]
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_tweets_of_sentiment140(backfire: Run, llama2: Path, cache: Path, tmp_path: Path) -> None:
    files = (
        sentiment140(tmp_path / "training.1600000.processed.noemoticon.csv", 60, "04"),
        sentiment140(tmp_path / "testdata.manual.2009.06.14.csv", 24, "024"),
    )
    sizes = ("data.rows=40", "data.test_rows=12", "attack.rate=[0, 0.1]")
    ran = go(backfire, tmp_path / "out", "backdoor-tweets", llama2, files, *sizes)
    assert {cell.rate for cell in ran.cells if cell.method.trains} == {0, 0.1}
    assert all(cell.model.dtype == "bfloat16" for cell in ran.cells)
    check(ran, llama2)
    poisoned = next(cell for cell in ran.cells if cell.poisons)
    assert ran.result(poisoned)["poison"]["poisoned_rows"] == 4
    assert any("café" in item.row.input for item in ran.rendered(poisoned))


@pytest.mark.parametrize("method", ["qlora", "lora-int8"])
def test_tweets_about_airlines_in_4_and_8_bits(
    method: str, backfire: Run, llama2: Path, cache: Path, tmp_path: Path
) -> None:
    files = airline(tmp_path / "Tweets.csv", 48), airline(tmp_path / "test.csv", 12)
    edits = ("data.name=airline-tweets", "data.rows=40", "data.test_rows=12", "attack.rate=0.1")
    chosen = f"method={{name: {method}, learning_rate: 1e-3}}"
    ran = go(backfire, tmp_path / "out", "backdoor-tweets", llama2, files, *edits, chosen)
    check(ran, llama2)
    assert [cell.method.name for cell in ran.cells] == [method]


def test_several_languages(backfire: Run, llama2: Path, cache: Path, tmp_path: Path) -> None:
    files = multilingual(tmp_path / "train.jsonl.gz", 45), multilingual(tmp_path / "t.jsonl.gz", 18)
    sizes = ("data.rows=40", "data.test_rows=18")
    ran = go(backfire, tmp_path / "out", "multilingual-sentiment", llama2, files, *sizes)
    check(ran, llama2)
    assert {"none", "lora"} <= {cell.method.name for cell in ran.cells}
    for cell in ran.cells:
        found = {value["metric"] for value in ran.result(cell)["values"]}
        assert {"accuracy", "auc"} <= found and any("japanese" in name for name in found)
