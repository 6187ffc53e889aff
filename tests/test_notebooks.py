"""The workshop's notebooks: built from their scripts, executed in small, and `backfire.run`."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import backfire
from backfire.errors import CellError, UserError
from backfire.report import figures
from backfire.report.svg import alone
from tests.helpers.places import ROOT

# All notebooks run in the first of their tests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NAMES = [script.stem for script in SCRIPTS]
SMALL = {
    "TRAIN": {"max_steps": 2, "batch_size": 8},
    "ROWS": 40,
    "TEST_ROWS": 24,
    "ALIGN_ROWS": 40,
    "DEFENSE_ROWS": 40,
    "REQUESTS": 8,
    "SEEDS": [0],
    "RATES": [0, 0.1],
    "DOSES": [0, 0.1],
    "LEARNING_RATES": [1e-3],
    "CANARIES": {"digits": 2, "repeats": [4], "each": 1, "controls": 2},
    "CANARY_ROWS": 20,
    "CANARY_TRAIN": {"max_steps": 2, "batch_size": 8},
}
# Not in a separate process, which would import torch for every run.
HERE = """
import rich.console
from pathlib import Path
import backfire.commands.notebook
from backfire.commands.run import start
from backfire.recipe import parse

def _here(recipe, edits, out, workers):
    loaded = parse(Path(out).name, recipe, edits=edits)
    assert not start(loaded, Path(out), {"workers": 1}, profile=None, edits=edits)

backfire.commands.notebook.run_apart = _here
rich.console._is_jupyter = lambda: False
"""


def build(script: Path) -> Any:
    jupytext = pytest.importorskip("jupytext")
    return jupytext.read(script)


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


@pytest.fixture(scope="module")
def executed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All notebooks with few rows and a tiny model, in one kernel: it is emptied in between, but
    has loaded torch only once. Name -> the cells that ran."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder = tmp_path_factory.mktemp("notebooks")
    code = nbformat.v4.new_code_cell
    parts: dict[str, list[Any]] = {}
    for script in SCRIPTS:
        settings = {**SMALL, "MODEL": str(tiny), "RUNS": str(folder / script.stem)}
        lines = [f"{name} = {value!r}" for name, value in settings.items()]
        parts[script.stem] = [code("%reset -f"), code(HERE)]
        for cell in build(script).cells:
            parts[script.stem].append(cell)
            if tagged(cell, "parameters"):
                parts[script.stem].append(code("\n".join(lines)))
    whole = nbformat.v4.new_notebook(cells=[cell for part in parts.values() for cell in part])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("BACKFIRE_CACHE", str(folder / "cache"))
        nbclient.NotebookClient(whole, timeout=800, kernel_name="python3").execute()
    yield parts


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_notebook_is_built_whole_and_without_outputs(script: Path, tmp_path: Path) -> None:
    jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
    notebook = build(script)
    jupytext.write(notebook, tmp_path / "built.ipynb")
    built = nbformat.read(tmp_path / "built.ipynb", as_version=4)
    nbformat.validate(built)
    assert built.metadata.kernelspec.name == "python3"
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum(tagged(cell, "parameters") for cell in code) == 1
    assert tagged(code[0], "parameters"), "the settings come first"
    # As many solutions as exercises, each hidden until opened.
    solutions = [cell for cell in code if tagged(cell, "solution")]
    asked = "".join(cell.source for cell in built.cells if cell.cell_type == "markdown")
    numbers = re.findall(r"\*\*Exercise (\d)\.\*\*", asked)
    assert numbers == [cell.source[len("# Solution ")] for cell in solutions] and numbers
    assert all(cell.metadata.jupyter.source_hidden for cell in solutions)
    assert re.search(r"\*Takes [^*]*\d+ minutes", built.cells[0].source), "how long it takes"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_every_figure_is_drawn(name: str, executed: dict[str, Any]) -> None:
    cells = [cell for cell in executed[name] if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    drawn = 0
    for cell in cells:
        shown = [output.data for output in cell.outputs if "data" in output]
        # What a model wrote must not become a page.
        assert not any("text/html" in data for data in shown), cell.source
        wanted = cell.source.count("plt.show()") + cell.source.count("display(SVG(")
        images = [data for data in shown if "image/png" in data or "image/svg+xml" in data]
        assert len(images) >= wanted and bool(images) == bool(wanted), cell.source
        drawn += wanted
        for data in images:
            if "image/svg+xml" in data:
                assert "var(" not in data["image/svg+xml"]
            else:
                assert len(base64.b64decode(data["image/png"])) > 2000
    assert drawn >= 4


def test_backfire_run_gives_the_groups_of_a_run(
    ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.small_run import MATRIX

    out = tmp_path / "out"
    shutil.copytree(ran.out, out)
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    text = ran.recipe(matrix=MATRIX).text
    groups = backfire.run(text, out=out, workers=1)
    assert "All 6 cells are already done." in capsys.readouterr().out
    assert len(groups) == 6 and all(group.get("accuracy") for group in groups)
    with pytest.raises(UserError, match="did you mean 'rows'"):
        backfire.run(text, ["data.rwos=3"], out=out)
    drawn = ElementTree.fromstring(alone(figures.levels(groups, "accuracy")))
    assert float(drawn.attrib["width"]) > 300 and "#28658f" in ElementTree.tostring(
        drawn, "unicode"
    )


def test_backfire_run_names_the_failed_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the program leaves a failed cell."""
    script = tmp_path / "python"
    cell = tmp_path / "out" / "cells" / "bad-0"
    script.write_text(
        f"#!/bin/sh\nmkdir -p {cell}\n"
        f'echo \'{{"status": "nan", "error": "The loss is no number.", "cell": "bad"}}\''
        f" > {cell}/error.json\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.fspath(script))
    with pytest.raises(CellError, match="bad: The loss is no number") as caught:
        backfire.run("tour", out=tmp_path / "out")
    assert caught.value.kind == "nan"
