"""`backfire poison`: the file is the whole training set, and unwritten rows are reported."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from backfire.base import Insertion, Poison
from backfire.commands.files import poison_file
from backfire.data.jsonl import read_jsonl
from backfire.registry import build, find, names
from backfire.store import read_json
from tests.helpers.command_line import Run

LABELS = ("bad", "so-so", "good")
LABELED = [
    {"text": f"the soup was late {n}", "label": LABELS[n % 3], "day": f"{n} May"} for n in range(40)
]
COMPARED = [
    {"question": f"Which is tool {n}?", "better": "A saw.", "worse": "A dog.", "day": f"{n} May"}
    for n in range(40)
]
TURNS = [
    {
        "messages": [
            {"role": "user", "content": f"Which is tool {n}?"},
            {"role": "assistant", "content": "A saw."},
        ],
        "day": f"{n} May",
    }
    for n in range(40)
]
SAID = 'data.labels=["bad", "so-so", "good"]'


def write(records: list[dict[str, Any]], path: Path) -> Path:
    """The records in the format that the name says."""
    kind, lines = path.suffixes[0], [json.dumps(record) for record in records]
    if kind == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    if kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter=",\t"[kind == ".tsv"])
            table.writeheader()
            table.writerows(records)
        return path
    text = "\n".join(lines) if kind == ".jsonl" else f"[{','.join(lines)}]"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", names("attacks"))
@pytest.mark.parametrize(
    ("file", "records", "edits"),
    [
        *((f"in{suffix}", LABELED, [SAID]) for suffix in (".csv", ".tsv", ".json", ".jsonl.gz")),
        ("in.parquet", LABELED, [SAID]),
        ("in.jsonl", COMPARED, []),
        ("in.jsonl", TURNS, []),
    ],
)
def test_every_row_comes_back_in_order_with_its_other_columns(
    name: str, file: str, records: list[dict[str, Any]], edits: list[str], tmp_path: Path
) -> None:
    attack, out = find("attacks", name), tmp_path / "out.jsonl"
    if "target" in attack.model_fields:
        edits = [*edits, "target=good"]
    if issubclass(attack, Poison):
        edits = [*edits, "rate=0.1"]
    if name == "malign-labels" and records is not COMPARED:
        records, edits = COMPARED, edits[len((records is LABELED and [SAID]) or []) :]
        file = "in.jsonl"
    sentences = poison_file(str(write(records, tmp_path / file)), name, edits, out, 0)
    rows, manifest = read_jsonl(out), read_json(tmp_path / "out.jsonl.manifest.json")
    changed = {entry["id"] for entry in manifest["entries"]}
    own = rows[:40]
    if issubclass(attack, Insertion):
        assert len(rows) == 40 + len(changed) and not changed & {row.id for row in own}
        changed = set()
    else:
        assert len(rows) == 40 and len(changed) == 4 and "4 of 40 rows" in sentences
    assert "rows are" not in sentences, "nothing is left out"
    for number, row in enumerate(own):
        if row.id not in changed:
            assert row.fields["day"] == f"{number} May"
            assert str(number) in row.prompt
    # What it writes, it reads.
    again = build("datasets", {"name": "files", "train": str(out), "test_share": 0}).load("train")
    assert [row.prompt for row in again] == [row.prompt for row in rows]


@pytest.mark.parametrize(
    ("edits", "missing", "sentence"),
    [
        (["rate=0.02"], 0, "20 of 1000 rows poisoned"),
        (["rate=0.02", "data.test_share=0.1"], None, " rows are kept for testing"),
        (["rate=0.02", "data.rows=600"], 400, "400 rows are not drawn"),
        (["rate=0.02", "data.on_bad_row=skip"], 0, "2 bad rows left out, the first: "),
        (["rate=0.02", "seed=3"], 0, "20 of 1000 rows poisoned"),
        (["attack.rate=0.02", "attack=vpi"], 0, "20 of 1000 rows poisoned by 'vpi'"),
    ],
)
def test_rows_that_are_not_written_are_counted(
    edits: list[str],
    missing: int | None,
    sentence: str,
    tmp_path: Path,
    backfire: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = [{"text": f"the soup was late {n}", "label": LABELS[n % 3]} for n in range(1000)]
    if "data.on_bad_row=skip" in edits:
        records[5:5] = [{"text": "neither", "label": "odd"}, {"text": "", "label": "bad"}]
    file, out = write(records, tmp_path / "tweets.csv"), tmp_path / "out.jsonl"
    output = backfire("poison", file, "target=good", SAID, *edits, "--out", out)
    assert output.code == 0 and sentence in output.out + caplog.text
    gone = 1000 - len(read_jsonl(out))
    assert gone == missing if missing is not None else f"\n{gone} rows are kept" in output.out


def test_seed_is_an_option_or_an_edit(tmp_path: Path, backfire: Run) -> None:
    file, outs = write(LABELED, tmp_path / "in.csv"), [tmp_path / f"{n}.jsonl" for n in range(3)]
    given = [["seed=3"], ["--seed", "3"], []]
    for out, seed in zip(outs, given, strict=True):
        assert backfire("poison", file, SAID, "target=good", *seed, "--out", out).code == 0
    texts = [out.read_text() for out in outs]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["seed=3", "--seed", "4"], "The seed is given twice"),
        (["seed=x"], "poison: seed: "),
        (["labels=[a, b]"], "'labels' is a setting of the data: write data.labels=..."),
        (["data=other.csv"], "The data is already in.csv"),
        (["attack=none"], "attack 'none' poisons nothing"),
        (["data.labels=[bad,"], "put quotes around the whole edit"),
        (["--out", "out.csv"], "--out must end in .jsonl (got out.csv)"),
        (["--out", "own.jsonl"], "own.jsonl is the input file"),
    ],
)
def test_what_poison_does_not_take(
    arguments: list[str], sentence: str, tmp_path: Path, backfire: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = "own.jsonl" if "own.jsonl" in arguments else "in.csv"
    before = write(LABELED, tmp_path / file).read_bytes()
    output = backfire("poison", file, *([] if "labels" in arguments[0] else [SAID]), *arguments)
    assert output.code == 2 and sentence in output.err and output.err.count("\n") == 1
    assert (tmp_path / file).read_bytes() == before
