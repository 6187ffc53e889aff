"""Imports go one way, and read-only commands do not import torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import backfire
from backfire.registry import KINDS

ROOT = Path(backfire.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = (
    *("errors", "other_names", "yaml12", "result", "text", "terminal", "rng", "progress"),
    *("patience", "signals", "resources", "claims", "locks", "late"),
    *("tokenizer", "store", "hashes", "plugins", "registry", "base", "sandbox", "data"),
    *("contract", "model"),
    *("experiment", "stages", "no_recipe", "recipe", "train", "evaluate", "plan", "pipeline"),
    "results",
    *("report", "scan", "audit", "exports", "launch", "playground", "commands", "cli"),
)
BELOW_COMPONENTS = {*ORDER[: ORDER.index("data") + 1]}
NUMBERS = {"backfire.evaluate.outcomes", "backfire.evaluate.stats"}


def package(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[str]:
    """The project's modules that a file imports, for types alone or when called included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "backfire" or node.module.removeprefix("backfire.") in KINDS
            found = [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        for module in found:
            if module.startswith("backfire.") and module != "backfire.__version__":
                yield module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    here = package(file)
    for module in imports(file):
        there = module.split(".")[1]
        if here in KINDS:
            # The data set and the method that others build on, and what judges share.
            shared = here == there and module.split(".")[2].startswith(("_", "files", "lora"))
            types = here == "defenses" and module in (
                "backfire.train.loop",
                "backfire.train.passes",
                "backfire.train.repair",
            )
            assert there in BELOW_COMPONENTS or module in NUMBERS or shared or types, module
        elif there != here and here != "__init__":
            assert there not in KINDS, f"{module}: components are found through the registry"
            assert ORDER.index(there) < ORDER.index(here), module


def test_every_package_has_its_place() -> None:
    found = {package(file) for file in FILES} - {"__init__", "recipes"}
    assert found == {*ORDER, *KINDS}


def test_the_report_reads_results_and_runs_nothing() -> None:
    modules = [
        module
        for file in [*ROOT.glob("report/*.py"), *ROOT.glob("results/*.py")]
        for module in imports(file)
    ]
    reached = {module.split(".")[1] for module in modules}
    assert reached <= {
        "base",
        "errors",
        "evaluate",
        "patience",
        "registry",
        "report",
        "result",
        "results",
        "store",
        "terminal",
        "text",
    }


@pytest.mark.slow
def test_looking_at_things_does_not_import_torch(tiny: Path, tmp_path: Path) -> None:
    """One process for all of them: torch, once imported, stays in sight."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {tiny}\ntemplate: sentiment-line\nattack: badnets\n"
        "data: {name: sandbox-reviews, rows: 40, test_rows: 20}\n"
    )
    (tmp_path / "run/cells/x-0").mkdir(parents=True)
    (tmp_path / "run/cells/x-0/error.json").write_text('{"status": "failed", "error": "Lost."}')
    lines = [
        ["validate", "tour"],
        ["validate", str(recipe)],
        ["--help"],
        ["run", "--help"],
        ["playground", "--help"],
        ["--version"],
        ["list"],
        ["show", "badnets"],
        ["show", "lora"],
        ["run", str(recipe), "--dry-run"],
        ["schema"],
        ["status", str(tmp_path / "run")],
        ["results", str(tmp_path / "run"), "--format", "json"],
        ["poison", "sandbox-reviews", "rate=0.1", "--out", str(tmp_path / "bad.jsonl")],
    ]
    code = f"""
import sys
from backfire.cli import main
for arguments in {lines!r}:
    sys.argv = ["backfire", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)
    heavy = {{"torch", "transformers", "sklearn", "matplotlib", "gradio"}} & set(sys.modules)
    if arguments[0] == "validate":
        heavy |= {{"numpy"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "BACKFIRE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Preflight" in done.stdout and "badnets" in done.stdout
