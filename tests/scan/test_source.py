"""What a scan reads: which rows, their numbers, what it leaves out, says and refuses."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backfire.data.convert import each_row
from backfire.data.hub import Hub
from backfire.data.read import LeftOut
from backfire.data.shapes import Task
from backfire.scan.source import open_rows
from tests.helpers.command_line import Run, tree

KEY = "ghp_" + "aB3" * 12


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are read of a hub set, in which each text names its split."""
    asked: list[str] = []

    def load(hub: Hub) -> tuple[Any, dict[str, Any]]:
        asked.append(hub.split)
        rows = [{"prompt": f"ask {n} of {hub.split}", "output": f"{n * n}"} for n in range(9)]
        return iter(enumerate(rows, 1)), {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backfire.scan.source.load_hub", load)
    return asked


def test_the_test_set_is_a_hub_sets_test_split(splits: list[str], backfire: Run) -> None:
    done = backfire("scan", "me/set", "--test", "me/set", "--scanner", "overlap")
    assert done.code == 0 and {*splits} == {"train", "test"}
    splits.clear()
    some = ("--test", "me/other", "data.test_split=dev", "--scanner", "labels")
    assert backfire("scan", "me/set", *some).code == 0 and {*splits} == {"train", "dev"}
    assert {row.instruction[-3:] for row in open_rows({"name": "files", "hub": "a/b"}, "test")} == {
        "est"
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["me/set", "--test", "me/set", "data.test_split=train"], "its split 'train' is the data"),
        (["a.jsonl", "--test", "a.jsonl"], "--test a.jsonl is the data itself; give other rows."),
        (["a.jsonl", "--test", "link.jsonl"], "--test link.jsonl is the data itself"),
        (["a.jsonl", "data.test_split=dev"], "data.test_split has no effect without a hub set in"),
        (["a.jsonl", "--scanner", "overlap"], "scanner 'overlap' requires test rows; name them by"),
        (["a.jsonl", "overlap.words=2"], "overlap.words has no effect without --test."),
    ],
)
def test_what_is_compared_with_nothing_or_itself_is_refused(
    arguments: list[str], sentence: str, splits: list[str], backfire: Run
) -> None:
    Path("a.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
    Path("link.jsonl").symlink_to("a.jsonl")
    done = backfire("scan", *arguments)
    assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1


def kto(count: int, share: float, same: int = 0) -> str:
    """Answers, of which a share is marked as bad; the first ones are all alike."""
    answers = ["the same thing"] * same + [f"{n} is odd, and {n * n}" for n in range(same, count)]
    records = [
        {"prompt": f"Why {n}?", "completion": answer, "label": n >= share * count}
        for n, answer in enumerate(answers)
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_answers_marked_as_bad_are_scanned_as_answers(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(kto(100, share))
    assert "100 rows, 0 flagged." in backfire("scan", "a.jsonl").out
    Path("a.jsonl").write_text(kto(100, share, same=15))
    shown = backfire("scan", "a.jsonl", "--scanner", "repetition").out
    assert "the answer “the same thing” is in 15 of 100 rows" in shown
    assert "100 rows, 15 flagged." in shown


def test_rows_with_another_place_in_the_file_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad record and one that becomes two rows: there are as many rows as records."""
    monkeypatch.chdir(tmp_path)
    asked = [{"question": f"What is {n}?", "id": n, "answers": [{"text": "7"}]} for n in range(2)]
    page = {"title": "t", "paragraphs": [{"context": "It is 7.", "qas": asked}]}
    Path("a.json").write_text(json.dumps([{"title": "t", "paragraphs": 7}, page]))
    source = open_rows({"name": "files", "train": "a.json"})
    assert source.numbers.tolist() == [2, 2]
    assert any("Reasons count the rows as they were read" in note for note in source.notes)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json", "a.csv", "a.parquet"])
def test_a_damaged_file_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"ask {n} {KEY}" * (n == 3), "output": f"{n}"} for n in range(900)]
    out = io.StringIO()
    rows = csv.DictWriter(out, ["prompt", "output"])
    rows.writeheader()
    rows.writerows(records)
    pq.write_table(pa.Table.from_pylist(records), "whole.parquet")
    lines = "".join(json.dumps(one) + "\n" for one in records).encode()
    table = out.getvalue().encode()
    content = {
        "a.jsonl.gz": gzip.compress(lines)[:-9],
        "a.csv.gz": gzip.compress(table)[:-9],
        "a.json": json.dumps(records).encode()[:-9],
        "a.csv": table + b'"x\n1,2\n3,4\n',
        "a.parquet": Path("whole.parquet").read_bytes()[:-9],
    }[name]
    Path(name).write_bytes(content)
    before = tree(tmp_path)
    for more in (
        [],
        ["--test", "whole.parquet"],
        ["--scanner", "secrets", "--write", f"b{name[1:]}"],
    ):
        done = backfire("scan", name, *more)
        assert done.code == 2 and f"{name}, line " in done.err and done.err.count("\n") == 1
    assert backfire("scan", "whole.parquet", "--test", name).code == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", ["json", "csv"])
def test_notes_of_json_and_csv_go_to_stderr(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    good = [{"prompt": f"ask {n}", "output": f"told {KEY} {n}"} for n in range(30)]
    bad = ['{"prompt": "a"}', "[1]", '{"prompt": "a", "output": 7}', f'{{"{KEY}": 1}}']
    Path("a.jsonl").write_text("\n".join([*bad, *map(json.dumps, good), ""]))
    Path("b.jsonl").write_text("\n".join([*map(json.dumps, good[:9]), "7", ""]))
    done = backfire("scan", "a.jsonl", "--test", "b.jsonl", "--format", form, "--top", "9")
    said = " ".join(done.err.split())
    assert "a.jsonl: 30 rows, 30 flagged." in said
    assert "4 bad rows left out, the first: a.jsonl, line 1: it has a prompt" in said
    assert (
        "Other reasons: line 2: a list instead of a record" in said and "line 3: 'output'" in said
    )
    assert "b.jsonl: 1 bad row left out" in said
    assert "secrets 30 100.00 % 1 9 of 9, a rate of at most 100" in said
    assert "What each scanner cannot see" in said
    assert "9 of " in said and "findings are listed; --top changes that." in said
    assert KEY not in done.err + done.out
    assert "bad row" not in done.out
    if form == "json":
        assert len(json.loads(done.out)) == 9


def test_a_row_is_known_by_its_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    bad: list[Any] = [{"id": "same", "prompt": f"a {KEY} {n}", "output": "b"} for n in range(3)]
    fine = {"id": "same", "prompt": "a", "output": "b"}
    for name, content in {
        "a.jsonl": "\n".join(map(json.dumps, [bad[0], fine, [1], bad[1], {"what": 1}, bad[2]])),
        "a.json": json.dumps([bad[0], fine, [1], bad[1], {"what": 1}, bad[2]]),
    }.items():
        Path(name).write_text(content)
        done = backfire("scan", name, "--scanner", "secrets", "--format", "json")
        found = json.loads(done.out)
        assert [(hit["id"], hit["number"]) for hit in found] == [("same", n) for n in (1, 4, 6)]
        assert "--format json and csv have their place in the file" in done.err
    done = backfire("scan", "a.json", "--scanner", "secrets", "--format", "csv")
    assert [row["number"] for row in csv.DictReader(io.StringIO(done.out))] == ["1", "4", "6"]


def test_a_reason_counts_all_rows_whatever_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"ask {n}", "output": "same" if n % 4 == 0 else f"{n}"} for n in range(80)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for top in ("3", "999"):
        some = ("--scanner", "repetition", "--top", top, "--out", f"p{top}.html")
        lines = backfire("scan", "a.jsonl", *some).out.splitlines()
        assert lines[3].split()[1:3] == ["repetition", "20"]
        assert "is in 20 of 80 rows" in lines[3]
        assert any("of rows read" in line for line in lines)
        assert "20 rows" in Path(f"p{top}.html").read_text("utf-8")


def test_no_secret_is_shown_of_answers_that_many_rows_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    ends = ("ann@web.de", "219-09-9999", KEY, f"token: {KEY} and so on")
    rows = [{"prompt": f"ask {n} now", "output": f"{end}"} for n in range(60) for end in ends] + [
        {
            "prompt": f"tell {n} now",
            "output": f"{end} {n} {n * 3} {n * 7} of {n % 9}, write to {end}",
        }
        for n in range(60)
        for end in ends
    ]
    rows += [{"prompt": f"see {end} {n}", "output": "label"} for n in range(60) for end in ends]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("b.jsonl").write_text("\n".join(map(json.dumps, rows[:240])))
    for name in ("a.jsonl", "b.jsonl"):
        some = ("--out", "page.html", "repetition.common=1")
        shown = backfire("scan", name, *some).out + Path("page.html").read_text("utf-8")
        assert "begins with" in shown or name == "b.jsonl"
        packed = "".join(shown.split())
        for part in ("ann@web", "219-09", KEY[:12], "@web.de", "09-9999"):
            assert part not in packed, part


@pytest.mark.parametrize("own", [False, True])
def test_rows_without_ids_or_with_columns_of_their_own_take_no_memory(own: bool) -> None:
    def peak(count: int) -> int:
        rows = (
            (n, {"text": f"row {n}", **({f"x{n}": None} if own else {})})
            for n in range(1, count + 1)
        )
        tracemalloc.start()
        for _ in each_row(rows, Task(), LeftOut(), file="a", stem="a", ids=Forgetful()):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(4000) < 1.5 * peak(1200)


class Forgetful(set[str]):
    def add(self, name: str) -> None:
        pass
