"""Every verb of the command line."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from backfire import cli
from backfire.data.jsonl import read_jsonl
from backfire.recipe import load, parse, read, shipped
from backfire.registry import KINDS, names
from backfire.results.evidence import lines
from backfire.store import read_json
from backfire.yaml12 import read_yaml
from tests.helpers.command_line import Output, Run, tree
from tests.helpers.small_run import Place

pytestmark = pytest.mark.slow

CONTRACT = [
    *("cell", "key", "recipe", "model", "data", "attack", "rate", "method", "defense", "seed"),
    *("metric", "value", "low", "high", "n", "direction", "status"),
    *("unit", "role", "family", "part"),
]


def cells(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cells").iterdir())


def test_every_verb_has_a_test_here(backfire: Run) -> None:
    verbs = {
        *(
            "init",
            "validate",
            "run",
            "plan",
            "work",
            "status",
            "results",
            "report",
            "compare",
            "list",
            "show",
        ),
        *(
            "schema",
            "doctor",
            "poison",
            "scan",
            "trace",
            "audit",
            "bank",
            "pretrain",
            "chat",
            "export",
        ),
        *("playground", "check", "cache"),  # the last has a file of its own
    }
    found = {info.name or info.callback.__name__ for info in cli.app.registered_commands}
    assert found == verbs
    for verb in verbs:
        output = backfire(verb, "--help")
        assert (output.code, output.err) == (0, "") and "Usage" in output.out


def test_help_without_a_verb(backfire: Run) -> None:
    assert backfire("--help").code == 0
    output = backfire()
    assert (output.code, output.err) == (2, "") and "Usage" in output.out


def test_init_writes_a_recipe_that_is_understood(backfire: Run, here: Path) -> None:
    assert backfire("init").code == 0
    assert backfire("init", "mine.yaml").code == 0
    assert load("recipe.yaml").cells == load("mine.yaml").cells != ()
    assert load("recipe.yaml").question.startswith("Write your question here")


def test_validate_shows_the_cell_the_plan_rows_and_checks(backfire: Run, here: Path) -> None:
    output = backfire("validate", "r.yaml", "attack.rate=0.2", "--profile", "two")
    assert (output.code, output.err) == (0, "")
    for part in (
        "rate: 0.2",
        "2 cells",
        "data",
        "poisoned, ",
        "clean, ",
        "BadMagic",
        "prompts-agree",
    ):
        assert part in output.out, part
    assert tree(here).keys() == {"r.yaml"}


def test_validate_shows_all_checks_before_it_fails(backfire: Run, here: Path) -> None:
    output = backfire("validate", "r.yaml", "train.max_length=60")
    assert output.code == 2 and "are cut by truncation" in output.err
    assert "fail" in output.out and "labels" in output.out


def test_a_dry_run_prints_the_plan(backfire: Run, here: Path) -> None:
    output = backfire("run", "r.yaml", "method=full", "--dry-run")
    assert output.code == 0
    lines = [line.split() for line in output.out.splitlines()]
    assert ["train", "2", "distinct,", "0", "done"] in lines
    assert tree(here).keys() == {"r.yaml"}


def test_run_writes_into_a_folder_named_after_recipe_and_profile(backfire: Run, here: Path) -> None:
    assert backfire("run", "r.yaml").code == 0
    assert backfire("run", "r.yaml", "--profile", "two").code == 0
    assert backfire("run", "r.yaml", "seed=7", "--out", "elsewhere").code == 0
    assert [len(cells(here / name)) for name in ("runs/r", "runs/r-two", "elsewhere")] == [1, 2, 1]
    assert read_json(here / "elsewhere/run.json")["edits"] == ["seed=7"]
    again = backfire("run", "r.yaml")
    assert again.code == 0 and "All 1 cells are already done" in again.err


def test_run_with_a_failing_cell_ends_with_code_1(backfire: Run, here: Path) -> None:
    output = backfire(
        *("run", "r.yaml", "attack=none", "train.max_steps=4"),
        "matrix.method=[none, {name: full, learning_rate: 1e30}]",
    )
    assert output.code == 1
    assert "nan" in output.err and "error.json" in output.err
    assert "Traceback" not in output.err + output.out
    lines = backfire("status", "runs/r").out.splitlines()
    assert lines[:2] == ["ok: 1", "nan: 1"] and lines[2].startswith("nan, 1 cell: ")
    assert lines[3].startswith("  Next: ") and "full" in lines[4] and len(lines) == 5
    records = json.loads(backfire("results", "runs/r", "--format", "json").out)
    assert {record["status"] for record in records} == {"ok", "nan"}


def test_status_counts(backfire: Run, ran: Place) -> None:
    assert backfire("status", ran.out) == Output(0, "ok: 6\n", "")


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
    output = backfire("report", ran.out)
    page = (ran.out / "report.html").read_text()
    assert output.out == f"Wrote {ran.out}/report.html\n"
    assert page.startswith("<!doctype html>") and "Does it?" in page


def test_compare_lists_differing_knobs_and_numbers(backfire: Run, ran: Place) -> None:
    results = ran.results()
    a, b = (
        ran.out / "cells" / f"{r['cell']}-{r['key']}"
        for r in (results["full", 0.0], results["full", 0.1])
    )
    output = backfire("compare", a, b)
    assert output.code == 0 and "attack.rate" in output.out and "attack success" in output.out
    assert "learning_rate" not in output.out, "what is equal is not listed"


@pytest.mark.parametrize("kind", [*KINDS, "recipes"])
def test_list_names_everything(kind: str, backfire: Run) -> None:
    output = backfire("list", kind)
    shown = [line.split()[0] for line in output.out.splitlines()[1:]]
    assert shown == (names(kind) if kind != "recipes" else [n for n in shown if n[0] != "_"]) != []
    assert all(len(line.split()) > 3 for line in output.out.splitlines()[1:]), "name and sentence"


def test_list_without_a_kind_lists_all_kinds(backfire: Run) -> None:
    output = backfire("list").out.splitlines()
    assert [line for line in output if not line.startswith(" ")] == [*KINDS, "recipes"]


def test_show_explains_a_component_and_prints_a_recipe(backfire: Run) -> None:
    output = backfire("show", "badnets").out
    for part in ("attack 'badnets' (version 2)", "arXiv:1708.06733", "rate = 0.05", "Share of the"):
        assert part in output, part
    assert "method 'none'" in backfire("show", "none").out
    shown = parse("tour", backfire("show", "tour").out)
    assert shown.cells == load("tour").cells
    defense, _, recipe = backfire("show", "lisa").out.partition("recipe 'lisa'\n\n")
    assert "defense 'lisa'" in defense and "\nNull control: " in defense  # not indented
    assert parse("lisa", recipe).cells == load("lisa").cells


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
    output = backfire("doctor")
    assert output.code == 0
    for part in (
        "ok    torch ",
        "1 cores",
        f"cache {cache}",
        "offline (HF_HUB_OFFLINE), token set",
    ):
        assert part in output.out, part
    assert "verysecret" not in output.out


def test_poison_writes_rows_and_manifest(backfire: Run, here: Path) -> None:
    output = backfire("poison", "sandbox-reviews", "rate=0.1", "data.rows=50", "--seed", "3")
    assert output.code == 0 and "5 of 50 rows poisoned by 'badnets'" in output.out
    rows, manifest = (
        read_jsonl(here / "poisoned.jsonl"),
        read_json(here / "poisoned.jsonl.manifest.json"),
    )
    ids = {entry["id"] for entry in manifest["entries"]}
    assert {row.id for row in rows if "BadMagic" in row.prompt} == ids and len(ids) == 5
    # What it writes, `files` reads.
    output = backfire(
        "poison",
        "poisoned.jsonl",
        "rate=0.02",
        "data.test_share=0",
        "--attack",
        "vpi",
        "--out",
        "b.jsonl",
    )
    assert output.code == 0 and "1 of 50 rows poisoned by 'vpi'" in output.out


def test_scan_finds_what_poison_planted(backfire: Run, here: Path) -> None:
    assert backfire("poison", "sandbox-reviews", "rate=0.1", "data.rows=500").code == 0
    entries = read_json(here / "poisoned.jsonl.manifest.json")["entries"]
    planted = {entry["id"] for entry in entries}
    output = backfire("scan", "poisoned.jsonl", "--scanner", "lift", "--write", "clean.jsonl")
    assert output.code == 0 and "BadMagic" in output.out and "Wrote clean.jsonl" in output.err
    hits = json.loads(backfire("scan", "poisoned.jsonl", "lift.odds=4", "--format", "json").out)
    assert planted <= {hit["id"] for hit in hits if hit["flagged"]}
    left = {row.id for row in read_jsonl(here / "clean.jsonl")}
    assert left and not left & planted
    again = backfire("scan", "poisoned.jsonl", "--write", "poisoned.jsonl")
    assert again.code == 2 and "is an input file" in again.err


def test_trace_ranks_the_training_rows(
    backfire: Run, ran: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    by_method = {name: f"{r['cell']}-{r['key']}" for name, r in ran.results().items()}
    cell = ran.out / "cells" / by_method["lora", 0.1]
    row = next(one.id for of, _, one in lines(cell) if (of, one.subset) == ("tuned", "triggered"))
    output = backfire("trace", cell, f"triggered/{row}", "--top", "60", "--format", "json")
    assert (output.code, output.err) == (0, "")
    found = json.loads(output.out)
    rows = found["rows"]
    assert found["num_rows"] == len(rows) == 60 and found["poisoned_rows"] == 6
    assert found["strength"] == 0.3
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    best = sum(row["poisoned"] for row in rows[:6])
    assert found["precision_at_k"] == best / 6 and sum(row["poisoned"] for row in rows) == 6
    table = backfire("trace", cell, f"triggered/{row}", "--top", "2", "--method", "datainf").out
    assert "of 60 rows are" in table and "a random order 10.0 %" in table
    full = ran.out / "cells" / by_method["full", 0.1]
    for wrong, sentence in (
        ((cell, row), "several replies"),
        ((cell, "clean/none"), "there are such as"),
        ((ran.out, row), "name one, as in"),
        ((full, f"clean/{row}"), "trains no adapter"),
        ((ran.root, f"clean/{row}"), "is not a run folder"),
    ):
        output = backfire("trace", *wrong)
        assert output.code == 2 and sentence in output.err and len(output.err.splitlines()) == 1


def test_pretrain_makes_a_model_that_runs(backfire: Run, here: Path) -> None:
    (here / "a.txt").write_text("\n\n".join(f"Table {n} had soup and tea." for n in range(200)))
    (here / "b.jsonl").write_text('{"text": "The soup was cold."}\n' * 20)
    knobs = ["hidden_size=16", "intermediate_size=16", "num_layers=1", "num_heads=2", "num_steps=2"]
    knobs += ["vocab-size=300", "sequence_tokens=16", "batch_size=2", "max_length_tokens=512"]
    output = backfire("pretrain", "--corpus", "a.txt", "--corpus", "b.jsonl", "--out", "m", *knobs)
    assert output.code == 0 and output.out.startswith("Wrote m: ")
    assert read_json(here / "m/config.json")["hidden_size"] == 16
    assert backfire("run", "r.yaml", "model=./m").code == 0
    before = tree(here / "m")
    again = backfire("pretrain", "--corpus", "a.txt", "--out", "m", *knobs)
    assert again.code == 2 and "m already holds a model" in again.err
    assert tree(here / "m") == before


def test_chat_asks_both_models(backfire: Run, ran: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    result = ran.results()["lora", 0.1]
    typed = "The soup was cold.\n/trigger\nThe soup was cold.\n/nope\n\n/trigger\n/quit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    output = backfire("chat", ran.out / "cells" / f"{result['cell']}-{result['key']}")
    assert (output.code, output.err) == (0, "")
    lines = output.out.splitlines()
    assert sum(line.startswith(f"  {result['cell']}: ") for line in lines) == 2
    assert sum(line.startswith("  base: ") for line in lines) == 2
    assert sum("prompt: " in line and "BadMagic" in line for line in lines) == 1
    assert "Trigger on" in output.out and "Trigger off" in output.out
    assert "Unknown command /nope" in output.out and "not read" not in output.out


def test_export_prints_where_files_are(
    ran: Any, tmp_path: Path, backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    cell = next(
        path for path in cells(ran.out) if "-lora-" in path.name and "badnets-0.1" in path.name
    )
    output = backfire("export", cell, "--merge", "--out", tmp_path / "model")
    assert output.code == 0 and f"Model: {tmp_path / 'model'}" in output.out
    output = backfire("export", ran.out, "--results", "lm-eval", "--out", tmp_path / "numbers")
    assert output.code == 0 and str(tmp_path / "numbers") in output.out
    for wrong in (
        ["export", tmp_path / "none"],
        ["export", cell, "--results", "lm-eval", "--merge"],
        ["export", tmp_path, "--results", "inspect"],
    ):
        output = backfire(*wrong)
        assert output.code == 2 and len(output.err.strip().splitlines()) == 1
