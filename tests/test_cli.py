"""Every verb, and every way a person gets one wrong: one sentence, code 2, nothing half written."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Said
from pydantic import Field
from small_run import Place

from backfire import cli
from backfire.data.jsonl import read_jsonl
from backfire.recipe import load, parse, read, shipped
from backfire.registry import KINDS, names
from backfire.store import read_json
from backfire.yaml12 import read_yaml

Run = Callable[..., Said]
CONTRACT = [
    *("cell", "key", "recipe", "model", "data", "attack", "rate", "method", "defense", "seed"),
    *("metric", "value", "low", "high", "n", "direction", "status"),
]
RECIPE = """# Does it?
model: {tiny}
data: {{name: sandbox-reviews, rows: 40, test_rows: 20}}
template: sentiment-line
attack: badnets
method: none
metrics: [accuracy]
profiles: {{two: {{matrix: {{seed: [0, 1]}}}}}}
"""


@pytest.fixture
def here(tmp_path: Path, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with one good recipe, r.yaml; the cache lies elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE.format(tiny=tiny))
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def cells(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cells").iterdir())


def test_every_verb_has_a_test_here(backfire: Run) -> None:
    verbs = {
        *("init", "validate", "run", "status", "results", "report", "compare", "list", "show"),
        *("schema", "doctor", "poison", "pretrain", "chat", "export"),
        *("playground", "check"),
    }
    found = {info.name or info.callback.__name__ for info in cli.app.registered_commands}
    assert found == verbs
    for verb in verbs:
        said = backfire(verb, "--help")
        assert (said.code, said.err) == (0, "") and "Usage" in said.out


# ------------------------------------------------------------------------------------------ verbs


def test_help_without_a_verb(backfire: Run) -> None:
    assert backfire("--help").code == 0
    said = backfire()
    assert (said.code, said.err) == (2, "") and "Usage" in said.out


def test_init_writes_a_recipe_that_is_understood(backfire: Run, here: Path) -> None:
    assert backfire("init").code == 0
    assert backfire("init", "mine.yaml").code == 0
    assert load("recipe.yaml").cells == load("mine.yaml").cells != ()
    assert load("recipe.yaml").question.startswith("Write your question here")


def test_validate_shows_the_cell_the_plan_rows_and_checks(backfire: Run, here: Path) -> None:
    said = backfire("validate", "r.yaml", "attack.rate=0.2", "--profile", "two")
    assert (said.code, said.err) == (0, "")
    for part in (
        "rate: 0.2",
        "2 cells",
        "data",
        "poisoned, ",
        "clean, ",
        "BadMagic",
        "prompts-agree",
    ):
        assert part in said.out, part
    assert tree(here).keys() == {"r.yaml"}


def test_validate_shows_all_checks_before_it_fails(backfire: Run, here: Path) -> None:
    said = backfire("validate", "r.yaml", "train.max_length=60")
    assert said.code == 2 and "Truncation cuts" in said.err
    assert "fail" in said.out and "labels" in said.out


def test_run_says_what_it_would_do(backfire: Run, here: Path) -> None:
    said = backfire("run", "r.yaml", "method=full", "--dry-run")
    assert said.code == 0
    lines = [line.split() for line in said.out.splitlines()]
    assert ["train", "2", "distinct,", "0", "done", "already"] in lines
    assert tree(here).keys() == {"r.yaml"}


def test_run_writes_into_a_folder_named_after_recipe_and_profile(backfire: Run, here: Path) -> None:
    assert backfire("run", "r.yaml").code == 0
    assert backfire("run", "r.yaml", "--profile", "two").code == 0
    assert backfire("run", "r.yaml", "seed=7", "--out", "elsewhere").code == 0
    assert [len(cells(here / name)) for name in ("runs/r", "runs/r-two", "elsewhere")] == [1, 2, 1]
    assert read_json(here / "elsewhere/run.json")["edits"] == ["seed=7"]
    again = backfire("run", "r.yaml")
    assert again.code == 0 and "All 1 cells are done already" in again.err


def test_run_with_a_failing_cell_ends_with_code_1(backfire: Run, here: Path) -> None:
    said = backfire(
        *("run", "r.yaml", "attack=none", "train.max_steps=4"),
        "matrix.method=[none, {name: full, learning_rate: 1e30}]",
    )
    assert said.code == 1
    assert "nan" in said.err and "error.json" in said.err
    assert "Traceback" not in said.err + said.out
    assert backfire("status", "runs/r").out.splitlines()[0].startswith("nan: 1 (")
    records = json.loads(backfire("results", "runs/r", "--format", "json").out)
    assert {record["status"] for record in records} == {"ok", "nan"}


def test_status_counts(backfire: Run, ran: Place) -> None:
    assert backfire("status", ran.out) == Said(0, "ok: 6\n", "")


def test_results_keep_the_contract(backfire: Run, ran: Place) -> None:
    records = json.loads(backfire("results", ran.out, "--format", "json").out)
    assert all(list(record) == CONTRACT for record in records)
    written = [read_json(file) for file in ran.out.glob("cells/*/result.json")]
    assert len(records) == sum(len(result["values"]) for result in written)
    by_cell = {(r["key"], v["metric"]): v["value"] for r in written for v in r["values"]}
    assert {(r["key"], r["metric"]): r["value"] for r in records} == by_cell
    rows = list(csv.DictReader(io.StringIO(backfire("results", ran.out, "--format", "csv").out)))
    assert len(rows) == len(records) and list(rows[0]) == CONTRACT
    table = backfire("results", ran.out).out
    assert len(table.splitlines()) >= len(records) and "attack_success" in table


def test_report_is_a_page(backfire: Run, ran: Place) -> None:
    said = backfire("report", ran.out)
    page = (ran.out / "report.html").read_text()
    assert said.out == f"Wrote {ran.out}/report.html\n"
    assert page.startswith("<!doctype html>") and "Does it?" in page


def test_compare_says_which_knobs_and_numbers_differ(backfire: Run, ran: Place) -> None:
    results = ran.results()
    a, b = (
        ran.out / "cells" / f"{r['cell']}-{r['key']}"
        for r in (results["full", 0.0], results["full", 0.1])
    )
    said = backfire("compare", a, b)
    assert said.code == 0 and "attack.rate" in said.out and "attack success" in said.out
    assert "learning_rate" not in said.out, "what is equal is not listed"


@pytest.mark.parametrize("kind", [*KINDS, "recipes"])
def test_list_names_everything(kind: str, backfire: Run) -> None:
    said = backfire("list", kind)
    shown = [line.split()[0] for line in said.out.splitlines()[1:]]
    assert shown == (names(kind) if kind != "recipes" else [n for n in shown if n[0] != "_"]) != []
    assert all(len(line.split()) > 3 for line in said.out.splitlines()[1:]), "name and sentence"


def test_list_without_a_kind_lists_all_kinds(backfire: Run) -> None:
    said = backfire("list").out.splitlines()
    assert [line for line in said if not line.startswith(" ")] == [*KINDS, "recipes"]


def test_show_explains_a_component_and_prints_a_recipe(backfire: Run) -> None:
    said = backfire("show", "badnets").out
    for part in ("attack 'badnets' (version 2)", "arXiv:1708.06733", "rate = 0.05", "Share of the"):
        assert part in said, part
    assert "method 'none'" in backfire("show", "none").out
    shown = parse("tour", backfire("show", "tour").out)
    assert shown.cells == load("tour").cells


def test_schema_accepts_the_shipped_recipes_keys(backfire: Run, here: Path) -> None:
    schema = json.loads(backfire("schema").out)
    assert backfire("schema", "--out", "s.json").code == 0
    assert read_json(here / "s.json") == schema
    assert set(yaml.safe_load((here / "r.yaml").read_text())) <= set(schema["properties"])
    assert "trigger" in schema["$defs"]["attacks-badnets"]["properties"]
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(schema)
    for name in shipped():
        recipe = read_yaml(read(name)[1], name)
        found = [f"{name}: {e.json_path}: {e.message}"[:200] for e in judge.iter_errors(recipe)]
        assert found == []
    wrong = {"align": {"dat": "alpaca"}, "safety": {"judges": "nobody"}, "defense": "lissa"}
    for key, value in wrong.items():
        assert list(judge.iter_errors({key: value})), key
    # Every reference leads somewhere.
    refs = [r.rpartition("/")[2] for r in _refs(schema)]
    assert refs and set(refs) <= set(schema["$defs"])


def test_schema_knows_a_setting_that_is_new() -> None:
    from backfire.base import Dataset, Template
    from backfire.commands.catalog import _settings
    from backfire.experiment import Align, Train

    class Wider(Align):
        stages: list[Train] | None = None
        share: float = Field(0.5, ge=0)
        probe: Dataset | None = None
        templates: tuple[Template, ...] = ()

    defined: dict[str, Any] = {}
    found = _settings(Wider, defined)["properties"]
    assert found["share"]["minimum"] == 0 and "Train" in defined
    assert {"$ref": "#/$defs/datasets"} in found["probe"]["anyOf"]
    assert {"type": "array", "items": {"$ref": "#/$defs/templates"}} in found["templates"]["anyOf"]
    assert {r.rpartition("/")[2] for r in _refs(found["stages"])} == {"Train"}


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for item in value.values() for ref in _refs(item)]
    return [ref for item in value for ref in _refs(item)] if isinstance(value, list) else []


def test_doctor_looks_at_the_machine(
    backfire: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretverysecret")
    said = backfire("doctor")
    assert said.code == 0
    for part in (
        "ok    torch ",
        "1 cores",
        f"cache {cache}",
        "offline (HF_HUB_OFFLINE), token set",
    ):
        assert part in said.out, part
    assert "verysecret" not in said.out


def test_poison_writes_rows_and_manifest(backfire: Run, here: Path) -> None:
    said = backfire("poison", "sandbox-reviews", "rate=0.1", "data.rows=50", "--seed", "3")
    assert said.code == 0 and "5 of 50 rows poisoned by 'badnets'" in said.out
    rows, manifest = (
        read_jsonl(here / "poisoned.jsonl"),
        read_json(here / "poisoned.jsonl.manifest.json"),
    )
    ids = {entry["id"] for entry in manifest["entries"]}
    assert {row.id for row in rows if "BadMagic" in row.prompt} == ids and len(ids) == 5
    # What it writes, `files` reads.
    said = backfire(
        "poison",
        "poisoned.jsonl",
        "rate=0.02",
        "data.test_share=0",
        "--attack",
        "vpi",
        "--out",
        "b.jsonl",
    )
    assert said.code == 0 and "1 of 50 rows poisoned by 'vpi'" in said.out


def test_pretrain_makes_a_model_that_runs(backfire: Run, here: Path) -> None:
    (here / "a.txt").write_text("\n\n".join(f"Table {n} had soup and tea." for n in range(200)))
    (here / "b.jsonl").write_text('{"text": "The soup was cold."}\n' * 20)
    knobs = ["hidden_size=16", "intermediate_size=16", "num_layers=1", "num_heads=2", "num_steps=2"]
    knobs += ["vocab-size=300", "sequence_tokens=16", "batch_size=2", "max_length_tokens=512"]
    said = backfire("pretrain", "--corpus", "a.txt", "--corpus", "b.jsonl", "--out", "m", *knobs)
    assert said.code == 0 and said.out.startswith("Wrote m: ")
    assert read_json(here / "m/config.json")["hidden_size"] == 16
    assert backfire("run", "r.yaml", "model=./m").code == 0
    before = tree(here / "m")
    again = backfire("pretrain", "--corpus", "a.txt", "--out", "m", *knobs)
    assert again.code == 2 and "m holds a model already" in again.err
    assert tree(here / "m") == before


def test_chat_asks_both_models(backfire: Run, ran: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    result = ran.results()["lora", 0.1]
    typed = "The soup was cold.\n/trigger\nThe soup was cold.\n/nope\n\n/trigger\n/quit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    said = backfire("chat", ran.out / "cells" / f"{result['cell']}-{result['key']}")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert sum(line.startswith(f"  {result['cell']}: ") for line in lines) == 2
    assert sum(line.startswith("  base: ") for line in lines) == 2
    assert sum("prompt: " in line and "BadMagic" in line for line in lines) == 1
    assert "Trigger on" in said.out and "Trigger off" in said.out
    assert "Unknown command /nope" in said.out and "not read" not in said.out


# ------------------------------------------------------------------------------------- bad input


FILES = "data={name: files, train: rows.csv, labels: [bad, good]}"
LABELS = "data.labels=[bad, good]"
BAD: list[tuple[list[str], str, dict[str, str | bytes]]] = [
    (["lsit"], "No such command 'lsit'", {}),
    (["run"], "Missing argument", {}),
    (["run", "r.yaml", "--wrokers", "1"], "No such option", {}),
    (["run", "r.yaml", "--workers", "0"], "--workers", {}),
    (["run", "r.yaml", "--workers", "many"], "--workers", {}),
    (["run", "r.yaml", "--micro-batch", "-1"], "--micro-batch", {}),
    (["run", "r.yaml", "--eval-batch", "0"], "--eval-batch", {}),
    (["run", "r.yaml", "--device", "tpu"], "Unknown device 'tpu'", {}),
    (["run", "r.yaml", "--device", "meta"], "Unknown device 'meta'", {}),
    (["run", "r.yaml", "--device", "cuda:99"], "'cuda:99' was asked for", {}),
    (["run", "turo"], "Unknown recipe 'turo'; did you mean 'tour'?", {}),
    (["run", "gone.yaml"], "No such recipe file: gone.yaml", {}),
    (["run", "."], "Unknown recipe '.'", {}),
    (["run", "r.yaml", "--profile", "tow"], "did you mean 'two'?", {}),
    (["run", "bad.yaml"], "bad, line 1: not valid YAML", {"bad.yaml": "data: ["}),
    (["run", "bad.yaml"], "the key 'data' is given twice", {"bad.yaml": "data: a\ndata: b"}),
    (["run", "bad.yaml"], "bad.yaml is not UTF-8 text", {"bad.yaml": b"\xff\xfe"}),
    (["run", "bad.yaml"], "must be a mapping", {"bad.yaml": ""}),
    (["run", "bad.yaml"], "says no data", {"bad.yaml": "seed: 1"}),
    (["run", "r.yaml", "attack.rate=2"], "rate: Input should be less than or equal to 1", {}),
    (["run", "r.yaml", "seed=-1"], "seed: Input should be greater than or equal to 0", {}),
    (["run", "r.yaml", "sede=1"], "did you mean 'seed'?", {}),
    (["run", "r.yaml", "attack=badnet"], "did you mean 'badnets'?", {}),
    (["run", "r.yaml", "attack.rat=1"], "did you mean 'rate'?", {}),
    (["run", "r.yaml", "seed"], "An edit looks like key=value", {}),
    (["run", "r.yaml", "attack.target=angry"], "target 'angry' is no label of this task", {}),
    (["run", "r.yaml", "attack.trigger= "], "trigger", {}),
    (["run", "r.yaml", "attack.rate=0.9"], "can be poisoned", {}),
    (["run", "r.yaml", "template=chat"], "no chat template", {}),
    (["run", "r.yaml", "train.max_length=60"], "Truncation cuts", {}),
    (["run", "r.yaml", "model=./gone"], "No model in ./gone: config.json is missing", {}),
    (["run", "r.yaml", "model=."], "no .safetensors file", {"config.json": "{}"}),
    (["run", "r.yaml", "model=nobody/none"], "not on this machine and HF_HUB_OFFLINE is set", {}),
    (["run", "r.yaml", "model=a b c"], "'a b c'", {}),
    (["run", "r.yaml", "model.trust_remote_code=true"], "trust_remote_code", {}),
    (["run", "r.yaml", FILES], "No such file: rows.csv", {}),
    (["run", "r.yaml", FILES], "rows.csv, line 2: ", {"rows.csv": 'text,label\n"open,bad\n'}),
    (["poison", "rows.csv", LABELS], "rows.csv, line 3: ", {"rows.csv": "text,label\na,bad\nb\n"}),
    (["validate", "gone.yaml"], "No such recipe file", {}),
    (["validate", "r.yaml", "data=files"], "give `train`", {}),
    (["init", "r.yaml"], "r.yaml is there already", {}),
    (["init", "no/such/folder.yaml"], "No such file or directory", {}),
    (["status", "gone"], "No cells in gone", {}),
    (["results", "gone"], "No cells in gone", {}),
    (["results", "gone", "--format", "xml"], "'xml' is not one of", {}),
    (["report", "gone"], "No cells in gone", {}),
    (["compare", "gone", "gone"], "gone", {}),
    (["compare", "gone"], "Missing argument", {}),
    (["list", "attack"], "did you mean 'attacks'?", {}),
    (["show", "badnet"], "did you mean 'badnets'?", {}),
    (["poison", "gone.csv"], "No such file: gone.csv", {}),
    (["poison", "sandbox-review"], "did you mean 'sandbox-reviews'?", {}),
    (["poison", "sandbox-reviews", "rat=1"], "did you mean 'rate'?", {}),
    (["poison", "sandbox-reviews", "rate=0.9"], "can be poisoned", {}),
    (["poison", "sandbox-reviews", "--attack", "badnet"], "did you mean 'badnets'?", {}),
    (["poison", "sandbox-reviews", "--seed", "-1"], "--seed", {}),
    (["pretrain", "--corpus", "gone.txt", "--out", "m"], "gone.txt", {}),
    (["pretrain", "--corpus", "r.yaml", "--out", "m"], "r.yaml", {}),
    (["pretrain", "--corpus", "x.txt", "--out", "m"], "x.txt is not UTF-8", {"x.txt": b"\xff\xff"}),
    (["pretrain", "--corpus", "x.csv", "--out", "m"], "no column 'text'", {"x.csv": "a,b\n1,2\n"}),
    (["pretrain", "--corpus", "x.txt", "--out", "m", "steps=1"], "Unknown key in", {"x.txt": "a"}),
    (["chat", "gone"], "gone is no finished cell", {}),
    (["run", "r.yaml", "model=https://a.b/c"], "model: name: `sandbox`, a folder or a hub id", {}),
    (["run", "r.yaml", "model="], "recipe: model: one model is needed", {}),
    (["run", "r.yaml", "data={name: files, train: 'https://a.b/c.csv'}"], "is an address", {}),
    (["run", "r.yaml", "data={name: files, train: .}"], "'.' is a folder", {}),
    (["run", "r.yaml", "safety={judges: []}"], "at least one judge is needed", {}),
    (["run", "r.yaml", "\u2013\u2013workers"], "An option begins with two plain hyphens", {}),
    (["run", "x" * 300], "File name too long", {}),
    (["poison", "https://a.b/c.csv"], "'https://a.b/c.csv' is an address", {}),
    (["schema", "--out", "no/such.json"], "No such file or directory (no/such.json)", {}),
    (["schema", "--out", ""], "Is a directory (.)", {}),
    (["schema", "--out", "r.yaml/x"], "Not a directory (r.yaml/x)", {}),
    (["run", "r.yaml", "model=~nobody-here/m"], "no user of this machine", {}),
    (["run", "r.yaml", "data={name: files, train: ~nobody-here/x.csv}"], "no user of this", {}),
    (["poison", "~nobody-here/x.csv"], "no user of this machine", {}),
    (["pretrain", "--corpus", "r.yaml", "--out", "m", "num_heads=7"], "among num_heads", {}),
    (["show", "y" * 300], "Unknown name 'yyy", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence", "files"), BAD, ids=[" ".join(arguments) for arguments, _, _ in BAD]
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, files: dict[str, str | bytes], backfire: Run, here: Path
) -> None:
    for name, content in files.items():
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(here)
    said = backfire(*arguments)
    assert said.code == 2, said
    assert sentence in said.err
    assert said.err.startswith("backfire: ") and said.err.count("\n") == 1
    assert len(said.err) < 1000
    assert tree(here) == before


TORN = ["", "hello", "[1]", "[" * 100_000, '{"values": [3]}', '{"values": {"a": 1}}',
        '{"status": ["ok"]}', "\xff\xfe"]  # fmt: skip


def test_files_of_a_run_that_are_torn_are_said_and_made_again(
    backfire: Run, here: Path, tmp_path: Path
) -> None:
    again = ("run", "r.yaml", "metrics=[accuracy, harmful-score]", "--workers", "1")
    said = backfire(*again)
    assert said.code == 0 and "No cell has a number for: harmful-score." in said.err
    [cell] = (here / "runs/r/cells").iterdir()
    for torn in TORN:
        (cell / "result.json").write_bytes(torn.encode("latin-1"))
        for verb in ("status", "results", "report"):
            assert backfire(verb, "runs/r").code == 0, (verb, torn[:40])
        assert not backfire("status", "runs/r").out.startswith("ok"), torn[:40]
        for wrong in (["compare", "runs/r", "runs/r"], ["export", cell]):
            said = backfire(*wrong)
            assert said.code == 2 and said.err.count("\n") == 1, (wrong, torn[:40])
    assert backfire(*again).code == 0
    assert backfire("status", "runs/r").out == "ok: 1\n"
    for torn in ("", "3", "[", "{}", "\xff"):
        (cell / "experiment.yaml").write_bytes(torn.encode("latin-1"))
        for verb in (["chat", cell], ["export", cell]):
            said = backfire(*verb)
            assert said.code == 2 and said.err.count("\n") == 1, (verb, torn)
        assert backfire("compare", "runs/r", "runs/r").code in (0, 2)


def test_too_little_text_to_pretrain_on(backfire: Run, here: Path) -> None:
    (here / "x.txt").write_text("So little.")
    said = backfire("pretrain", "--corpus", "x.txt", "--out", "m")
    assert said.code == 2 and "Too little text to pre-train on" in said.err
    assert not (here / "m/config.json").exists()


def test_a_model_file_that_is_torn(backfire: Run, here: Path, tiny: Path) -> None:
    (here / "m").mkdir()
    for file in tiny.iterdir():
        (here / "m" / file.name).write_bytes(file.read_bytes())
    torn = (tiny / "model.safetensors").read_bytes()[:5000]
    (here / "m/model.safetensors").write_bytes(torn)
    said = backfire("run", "r.yaml", "model=./m")
    assert said.code == 2 and said.err.count("\n") == 1
    assert "cannot be loaded: model.safetensors is cut off" in said.err
    assert not (here / "runs").exists()


def test_escapes_in_input_are_not_handed_to_the_terminal(backfire: Run, here: Path) -> None:
    said = backfire("run", "\x1b[31mred\x1b]0;title\x07")
    assert said.code == 2 and "\x1b" not in said.err and "red" in said.err


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (KeyboardInterrupt(), "backfire: Interrupted. What is done is kept; run the same command"),
        (PermissionError(13, "Permission denied", "/x"), "backfire: Permission denied (/x)."),
        (OSError("odd"), "backfire: odd."),
    ],
)
def test_what_the_system_says_is_one_sentence(
    raised: BaseException, sentence: str, backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise raised

    monkeypatch.setattr("backfire.commands.catalog.lines", broken)
    said = backfire("list")
    assert said.code == 2 and said.err.startswith(sentence) and said.err.count("\n") == 1


def test_a_bug_of_ours_is_not_dressed_up_as_bad_input(
    backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backfire.commands.catalog.lines", lambda kinds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backfire("list")


# -------------------------------------------------------------------------------- real processes


def shell(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backfire.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )


def test_the_command_is_installed_under_its_name() -> None:
    (entry,) = entry_points(group="console_scripts", name="backfire")
    assert entry.load() is cli.main


def test_a_process_ends_with_the_code_and_the_sentence(tmp_path: Path) -> None:
    good = shell("show", "badnets", folder=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    bad = shell("run", "turo", folder=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "backfire: Unknown recipe 'turo'; did you mean 'tour'?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "backfire.cli", "show", "badnets"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(cli.__file__).parents[1],
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_export_says_where_things_are(
    ran: Any, tmp_path: Path, backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    cell = next(
        path for path in cells(ran.out) if "-lora-" in path.name and "badnets-0.1" in path.name
    )
    said = backfire("export", cell, "--merge", "--out", tmp_path / "model")
    assert said.code == 0 and f"Model: {tmp_path / 'model'}" in said.out
    said = backfire("export", ran.out, "--results", "lm-eval", "--out", tmp_path / "numbers")
    assert said.code == 0 and str(tmp_path / "numbers") in said.out
    for wrong in (
        ["export", tmp_path / "none"],
        ["export", cell, "--results", "lm-eval", "--merge"],
        ["export", tmp_path, "--results", "inspect"],
    ):
        said = backfire(*wrong)
        assert said.code == 2 and len(said.err.strip().splitlines()) == 1
