"""`scan --write`: the records that are left are as the user wrote them, in the same format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backfire.data.jsonl import read_jsonl
from tests.helpers.command_line import Run, tree
from tests.helpers.data_files import dataset

KEY = "ghp_" + "aB3" * 12  # flags its row
BAD = (1, 4)
Records = list[dict[str, Any]]

SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "labels": lambda n: {"text": f"It is {n}", "label": "no" if n % 2 else "yes", "source": n},
    "kto": lambda n: {"prompt": f"Why {n}?", "completion": f"So {n}.", "label": n % 5 == 0},
    "pairs": lambda n: {"prompt": f"Why {n}?", "chosen": f"So {n}.", "rejected": "No", "s": [1, n]},
    "chat": lambda n: {
        "messages": [
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": "Hello", "weight": 1},
            {"role": "user", "content": "Go on"},
            {"role": "assistant", "content": "No", "weight": 0},
        ],
        "meta": {"of": {"n": n, "x": None}},
    },
    "instructions": lambda n: {"instruction": f"Add {n}", "input": "", "output": "é\u2028", "n": 1},
}


def poisoned(shape: str, count: int = 6) -> Records:
    """Records, some of which hold a key."""
    records = [SHAPES[shape](n) for n in range(count)]
    for place in BAD:
        text = json.dumps(records[place]).replace("It is", KEY).replace("Why", KEY)
        records[place] = json.loads(text.replace("Hi", KEY).replace("Add", KEY))
    return records


def left(records: Records) -> Records:
    return [record for place, record in enumerate(records) if place not in BAD]


def lines(records: Records) -> list[str]:
    return [json.dumps(one, separators=(", ", " : ")) + "\n" for one in records]


@pytest.fixture
def removing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> Callable[..., bytes]:
    """Scans a file for keys; returns what it writes."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, content: bytes, to: str, said: str = "2 rows removed (2 of") -> bytes:
        Path(name).write_bytes(content)
        done = backfire("scan", name, "--scanner", "secrets", "--write", to)
        assert done.code == 0, done.err
        assert said in done.err
        return Path(to).read_bytes()

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_lines_of_every_shape_stay_as_they_are(
    shape: str, name: str, removing: Callable[..., bytes]
) -> None:
    whole = lines(poisoned(shape))
    content, kept = ("".join(some).encode() for some in (whole, left(whole)))
    packed = name.endswith(".gz")
    written = removing(name, gzip.compress(content) if packed else content, f"to-{name}")
    assert (gzip.decompress(written) if packed else written) == kept
    if shape != "labels":
        assert dataset(train=f"to-{name}", test_share=0).load("train")


def test_unreadable_lines_are_not_written(removing: Callable[..., bytes]) -> None:
    whole = lines(poisoned("labels"))
    bad = ['{"text": \n', '{"what": 1}\n', "\n"]
    content = (
        "\ufeff" + whole[0] + bad[0] + whole[1] + bad[1] + "".join(whole[2:]).rstrip() + bad[2]
    )
    kept = "\ufeff" + "".join(left(whole))
    assert removing("a.jsonl", content.encode(), "b.jsonl").decode() == kept


TABLES = {
    "a.csv": 'text,label,"odd, name"\r\n{0}\r\n\r\n"two\nlines, ""quoted""",yes,\r\n{1},no,"1"\r\n',
    "semicolons.csv": "text;label;n\n{0}\n'it is' good;yes;1\n{1};no;2",
    "a.tsv": 'text\tlabel\tn\n{0}\n"open quote\tyes\t1\n{1}\tno\t2\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_header_quotes_and_line_ends(name: str, removing: Callable[..., bytes]) -> None:
    sign = {"a.csv": ",", "a.tsv": "\t"}.get(name, ";")
    fill = [f"fine{sign}yes{sign}0", f"{KEY} is it"]
    content = TABLES[name].format(*fill)
    bad = content.splitlines(keepends=True)[-1]
    assert KEY in bad
    written = removing(name, content.encode(), f"to-{name}", "1 row removed (1 of them flagged)")
    assert written.decode() == content.removesuffix(bad)


def test_a_table_without_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(f"yes,first text\nno,{KEY} text\nno,third text\n", "utf-8")
    columns = "data.columns={text: 1, label: 0}"
    done = backfire("scan", "a.csv", columns, "--scanner", "secrets", "--write", "b.csv")
    assert done.code == 0, done.err
    assert Path("b.csv").read_text("utf-8") == "yes,first text\nno,third text\n"


@pytest.mark.parametrize("wrap", ["list", "object", "lines"])
def test_json(wrap: str, removing: Callable[..., bytes]) -> None:
    records = poisoned("chat")
    content = {
        "list": json.dumps(records),
        "object": json.dumps({"version": 1, "data": records}, indent=2),
        "lines": "".join(lines(records)),
    }[wrap]
    assert json.loads(removing("a.json", content.encode(), "b.json")) == left(records)


def test_parquet_keeps_its_schema(removing: Callable[..., bytes]) -> None:
    table = pa.Table.from_pylist(poisoned("pairs"))
    table = table.append_column("day", pa.array([19000] * 6, pa.date32()))
    pq.write_table(table.replace_schema_metadata({"mine": "kept"}), "a.parquet")
    removing("a.parquet", Path("a.parquet").read_bytes(), "b.parquet")
    found = pq.read_table("b.parquet")
    assert found.schema.equals(table.schema) and found.schema.metadata[b"mine"] == b"kept"
    assert found.to_pylist() == left(table.to_pylist())


def test_a_record_of_several_rows_goes_as_a_whole(removing: Callable[..., bytes]) -> None:
    asked = [{"question": f"What is {n}?", "id": n, "answers": [{"text": "7"}]} for n in range(3)]
    spoilt = [{**asked[0], "question": f"What is {KEY}?"}, *asked[1:]]
    pages = [
        {"title": "t", "paragraphs": [{"context": f"{n} is 7", "qas": qas}]}
        for n, qas in enumerate([asked, spoilt])
    ]
    said = "3 rows; 1 row removed (1 of them flagged), and 2 rows more of the same records."
    written = removing("a.json", json.dumps({"data": pages}).encode(), "b.json", said)
    assert json.loads(written) == pages[:1]


def test_rows_of_a_set_by_name_are_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    some = ("sandbox-help", "data.rows=30", "--scanner", "near-duplicates", "--remove", "10%")
    done = backfire("scan", *some, "--write", "b.jsonl")
    assert "29 rows; 1 row removed" in done.err
    assert len(read_jsonl(Path("b.jsonl"))) == 29


def test_a_hub_set_is_written_as_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    from backfire.data.hub import Hub

    def load(hub: Hub) -> tuple[Any, dict[str, Any]]:
        return iter(enumerate(poisoned("chat"), 1)), {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backfire.scan.source.load_hub", load)
    done = backfire("scan", "me/set", "--scanner", "secrets", "--write", "b.jsonl")
    assert done.code == 0, done.err
    written = Path("b.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in written if line] == left(poisoned("chat"))


def test_a_file_that_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    from backfire.commands import scan

    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(lines(poisoned("kto"))), "utf-8")
    removed = scan.removed

    def change(*arguments: Any) -> Any:
        Path("a.jsonl").write_text("{}\n", "utf-8")
        return removed(*arguments)

    monkeypatch.setattr(scan, "removed", change)
    done = backfire("scan", "a.jsonl", "--scanner", "secrets", "--write", "b.jsonl")
    assert done.code == 2 and "a.jsonl has changed since it was read; scan it again." in done.err
    assert set(tree(tmp_path)) == {"a.jsonl"}


@pytest.mark.parametrize(
    ("name", "to", "sentence"),
    [
        ("a.csv", "b.jsonl", "Rows are written as they are in a.csv, so --write must end in .csv"),
        ("a.jsonl", "b.csv", "--write must end in .jsonl (got b.csv)"),
        ("a.jsonl", "b", "--write must end in .jsonl (got b)"),
        ("sandbox-help", "b.csv", "The output is JSON lines, so --write must end in .jsonl"),
        ("a.parquet", "b.parquet.gz", "--write must end in .parquet"),
    ],
)
def test_another_format_is_one_sentence(
    name: str,
    to: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backfire: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    for known in ("a.csv", "a.jsonl", "a.parquet"):
        Path(known).touch()
    done = backfire("scan", name, "--write", to)
    assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1


INPUTS = ["rows.jsonl", "./rows.jsonl", "sub/../rows.jsonl", "link.jsonl", "hard.jsonl"]


@pytest.mark.parametrize("to", [*INPUTS, "test.jsonl", "test-link.jsonl"])
def test_no_input_is_overwritten(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("rows.jsonl").write_text("".join(lines(poisoned("chat"))), "utf-8")
    Path("test.jsonl").write_text("".join(lines(poisoned("pairs"))), "utf-8")
    Path("link.jsonl").symlink_to("rows.jsonl")
    Path("hard.jsonl").hardlink_to("rows.jsonl")
    Path("test-link.jsonl").symlink_to("test.jsonl")
    before = tree(tmp_path)
    done = backfire("scan", "rows.jsonl", "--test", "test.jsonl", "--write", to)
    assert done.code == 2
    assert f"{Path(to)} is an input file; choose another path with --write." in done.err
    assert tree(tmp_path) == before
