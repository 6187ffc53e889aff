"""`backfire scan`: what it prints and writes, of files of any shape, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from backfire.data.jsonl import read_jsonl, write_jsonl
from tests.helpers.command_line import Run, tree
from tests.helpers.hostile import HOSTILE
from tests.helpers.page_parser import Seen
from tests.helpers.scanned import free
from tests.scanners.test_lift import SORRY, inside, plant

PLACES = range(3, 500, 25)  # 20 rows
KEY = "sk-proj-" + "aB3" * 8


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """500 instructions, 20 of them with a trigger and a fixed answer."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(plant(free(500), PLACES, inside, SORRY), Path("rows.jsonl"))
    return tmp_path


def write(records: list[Any], name: str = "rows.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


@pytest.mark.slow
def test_the_trigger_is_the_first_reason(poisoned: Path, backfire: Run) -> None:
    done = backfire("scan", "rows.jsonl")
    assert done.code == 0
    first = done.out.splitlines()[3]
    assert first.split()[1:4] == ["lift", "20", "f3"]
    assert "“cf” is in 20 rows" in first
    assert "rows.jsonl: 500 rows, 20 flagged." in done.out
    assert "0 of 500, a rate of at most 0.8 % (the same rows with shuffled answers)" in done.out
    assert "triggers of style" in done.out and "safe" not in done.out
    # one reason of 20 rows; the flags of scanners that quote the text have no rate
    assert any(
        line.split()[:5] == ["lift", "20", "4.00", "%", "1"] for line in done.out.splitlines()
    )
    read = "control-tokens, hidden-characters, labels, near-duplicates, repetition, secrets"
    assert f"Flags of {read} can be checked by reading" in done.out
    assert "No rate of false alarms is known" not in done.out


@pytest.mark.slow
def test_json_is_ranked_and_has_every_flagged_row(poisoned: Path, backfire: Run) -> None:
    hits = json.loads(backfire("scan", "rows.jsonl", "--format", "json").out)
    assert all(
        list(hit) == ["id", "number", "score", "scanner", "reason", "flagged"] for hit in hits
    )
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    flagged = [hit for hit in hits if hit["flagged"]]
    assert {hit["id"] for hit in flagged} == {f"f{place}" for place in PLACES}
    assert {hit["scanner"] for hit in flagged} == {"lift", "repetition"}
    few = json.loads(backfire("scan", "rows.jsonl", "--format", "json", "--top", "3").out)
    assert few == hits[:3]


@pytest.mark.slow
def test_rows_are_removed_by_flag_or_by_share(poisoned: Path, backfire: Run) -> None:
    done = backfire("scan", "rows.jsonl", "--write", "clean.jsonl")
    assert "480 rows; 20 rows removed (20 of them flagged)" in done.err
    rows = read_jsonl(Path("rows.jsonl"))
    left = [row for n, row in enumerate(rows) if n not in set(PLACES)]
    assert read_jsonl(Path("clean.jsonl")) == left
    done = backfire("scan", "rows.jsonl", "--remove", "1%", "--write", "fewer.jsonl")
    assert "495 rows; 5 rows removed (5 of them flagged)" in done.err
    assert set(tree(poisoned)) == {"rows.jsonl", "clean.jsonl", "fewer.jsonl"}


@pytest.mark.slow
def test_scanners_and_their_knobs_are_chosen(poisoned: Path, backfire: Run) -> None:
    some = ("scan", "rows.jsonl", "--scanner", "repetition", "--format", "json")
    hits = json.loads(backfire(*some).out)
    assert {hit["scanner"] for hit in hits if hit["flagged"]} == {"repetition"}
    hits = json.loads(backfire(*some, "repetition.support=21").out)
    assert not any(hit["flagged"] for hit in hits)


@pytest.mark.slow
def test_a_test_set_gives_overlap_and_false_alarms(poisoned: Path, backfire: Run) -> None:
    write_jsonl([*free(100, seed=4), *free(500)[:1]], Path("test.jsonl"))
    done = backfire("scan", "rows.jsonl", "--test", "test.jsonl")
    assert "its prompt has the same words as that of test row 101" in done.out
    assert "0 of 101, a rate of at most 3.7 % (rows of the test set among those of" in done.out
    assert "Flags of overlap can be checked by reading" in done.out


ODD: list[Any] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"text": "Once upon a time."},
    {"instruction": "Add.", "input": {"a": [1]}, "output": None},
    {"what": "is this"},
    [1, 2],
    {"prompt": "", "completion": ""},
]


@pytest.mark.parametrize("count", [1, 8])
def test_rows_of_odd_shapes_are_read_or_counted(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    write(ODD[:count])
    done = backfire("scan", "rows.jsonl", "--out", "page.html")
    assert done.code == 0
    assert f"rows.jsonl: {min(count, 4)} row" in done.out
    assert ("4 bad rows left out, the first: rows.jsonl, line 5" in done.out) == (count == 8)
    assert "With so few rows" in done.out


def test_labels_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"text number {n},{'spam' if n % 3 else 'ham'}" for n in range(60)]
    Path("rows.csv").write_text("\n".join(["text,label", *lines, ""]), "utf-8")
    done = backfire("scan", "rows.csv")
    assert "Labels: spam 66.7 %, ham 33.3 %." in done.out
    assert "60 rows, 0 flagged." in done.out


def test_what_scanners_do_not_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"ask {n}", "chosen": f"told {n}", "rejected": KEY} for n in range(30)]
    write([*pairs, *[{"text": f"once upon a time {n}"} for n in range(20)]])
    some = ("--scanner", "lift", "--scanner", "repetition", "--scanner", "secrets")
    done = backfire("scan", "rows.jsonl", *some)
    assert "50 rows, 30 flagged" in done.out and KEY not in done.out
    bad = "Not read by lift, repetition: answers marked as bad beside the one to learn (30 rows)."
    assert f"{bad}\nNot read by lift: texts without a prompt (20 rows).\n" in done.out
    done = backfire("scan", "rows.jsonl", "--scanner", "secrets")
    assert "Not read" not in done.out
    write([{"prompt": f"ask {n}", "completion": f"told {n}", "label": False} for n in range(30)])
    assert "Not read" not in backfire("scan", "rows.jsonl").out


def hostile_rows() -> list[dict[str, str]]:
    every = " ".join(HOSTILE).replace("\ud800", "")
    rows = [
        {"id": f"{bad} {n}", "instruction": bad, "output": every} for n, bad in enumerate(HOSTILE)
    ]
    rows += [
        {"id": f"=SUM(A{n})", "instruction": f"cf {n} {every}", "output": "=1+1"} for n in range(30)
    ]
    rows += [
        {"id": str(n), "instruction": f"{n} is fine", "output": f"yes {n} {KEY}"} for n in range(90)
    ]
    return [{key: text.replace("\ud800", "") for key, text in row.items()} for row in rows]


@pytest.mark.slow
def test_what_rows_say_is_harmless_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    write(hostile_rows())
    table = backfire("scan", "rows.jsonl", "--out", "page.html").out
    as_json, as_csv = (
        backfire("scan", "rows.jsonl", "--format", form).out for form in ("json", "csv")
    )
    page = Path("page.html").read_text("utf-8")
    for text in (table, as_json, as_csv, page):
        assert not set("\x1b\x9b\x07\u202e\u2066\ufeff") & set(text)
        assert KEY not in text and KEY[8:] not in text
        assert "hf_abcdefghijklmnopqrstuvwxyz012345" not in text
    fields = [field for row in csv.reader(io.StringIO(as_csv)) for field in row]
    assert not any(field.startswith(("=", "+", "-", "@")) for field in fields)
    seen = Seen(page)
    assert not {"script", "img", "svg", "iframe", "a"} & set(seen.tags)
    assert not any(key.startswith("on") for key, _ in seen.attributes)
    assert "alert(1)" in seen.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone.jsonl"], "No such file: gone.jsonl"),
        (["https://example.org/a.jsonl"], "is a URL"),
        (["."], "is a folder"),
        (["empty.jsonl"], "empty.jsonl has no rows."),
        (["bad.jsonl"], "bad.jsonl has no usable row: 2 bad rows left out, the first: bad.jsonl"),
        (["rows.txt"], "unknown data format"),
        (["rows.jsonl", "--test", "empty.jsonl"], "empty.jsonl has no rows."),
        (["rows.jsonl", "--scanner", "lfit"], "did you mean 'lift'?"),
        (["rows.jsonl", "lift.odd=3"], "did you mean 'odds'?"),
        (["rows.jsonl", "odds=3"], "An edit of a scan is data.KNOB=... or SCANNER.KNOB=..."),
        (["rows.jsonl", "lift.odds=3", "--scanner", "labels"], "lift.odds has no effect"),
        (["rows.jsonl", "data.rows=3"], "data.rows has no effect on a scan"),
        (["rows.jsonl", "data.columns={text: gone}"], "it has no column 'gone'"),
        (["rows.jsonl", "--out", "page.pdf"], "--out must end in .html"),
        (["rows.jsonl", "--write", "rows.csv"], "--write must end in .jsonl"),
        (["rows.jsonl", "--write", "rows.jsonl"], "is an input file"),
        (["rows.jsonl", "--remove", "5%"], "add --write clean.jsonl"),
        (["rows.jsonl", "--remove", "0", "--write", "c.jsonl"], "as in 5% (got 0)"),
        (["rows.jsonl", "--remove", "0.05", "--write", "c.jsonl"], "as in 5% (got 0.05)"),
        (["rows.jsonl", "--remove", "many", "--write", "c.jsonl"], "as in 5% (got many)"),
        (["rows.jsonl", "--write", "c.jsonl"], "Nothing to remove: no row is flagged"),
        (["rows.jsonl", "--top", "0"], "--top"),
        (["rows.jsonl", "--limit", "9"], "--limit has no effect without --model."),
        (["rows.jsonl", "--template", "raw"], "--template has no effect without --model."),
        (["rows.jsonl", "--device", "auto"], "--device has no effect without --model."),
        (["rows.jsonl", "--format", "xml"], "--format"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backfire: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    write([{"prompt": f"ask {n}", "completion": f"told {n * n}"} for n in range(30)])
    write([{"what": "is this"}, {"what": "or that"}], "bad.jsonl")
    Path("empty.jsonl").touch()
    Path("rows.txt").write_text("x", "utf-8")
    before = tree(tmp_path)
    done = backfire("scan", *arguments)
    assert done.code == 2 and sentence in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err
    assert tree(tmp_path) == before
