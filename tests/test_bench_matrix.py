"""`make bench` in small: both sides of the matrix do the same work. Times are not checked."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from backfire.cli import app
from backfire.tokenizer import load_tokenizer
from tests.helpers.places import ROOT

SIZES = ["--shape", "tiny", "--rows", "32", "--test-rows", "12", "--requests", "4"]
SIZES += ["--new-tokens", "3", "--cells", "1", "2", "--script-cells", "2"]
LEAST = ["--repetitions", "1", "--parts-repetitions", "0", "--row-counts", "16"]


def _in_this_process(command: Sequence[str], env: Mapping[str, str], log: Path) -> Any:
    """Runs a side without a process of its own, which would import everything again."""
    tree, script = (importlib.import_module(f"benchmarks.{n}") for n in ("tree", "matrix_script"))
    if "backfire.cli" in command:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BACKFIRE_CACHE", env["BACKFIRE_CACHE"])
            line = [*command[command.index("backfire.cli") + 1 :], "--workers", "1"]
            app(line, standalone_mode=False)
    else:
        folder = command[command.index("benchmarks.matrix_script") + 1]
        script.main([folder, "--threads", "1"])
    return tree.Usage(10.0, 15.0, 200.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a tiny matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        matrix = importlib.import_module("benchmarks.matrix")
        patch.setattr(matrix, "watched", _in_this_process)
        out = tmp_path_factory.mktemp("results")
        path: Path = matrix.main([*SIZES, *LEAST, "--out", str(out)])
    return path


@pytest.fixture
def result(written: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_both_sides_get_the_same_numbers(result: dict[str, Any]) -> None:
    equal = result["equality"]
    assert equal["cells"] == equal["cells with equal metrics"] == 2
    assert equal["equal replies"] == 1.0
    assert equal["largest relative difference of a loss"] < 1e-5
    assert equal["largest difference of a log-likelihood, nats"] < 1e-4


@pytest.mark.slow
def test_the_sides_and_sizes_are_measured(result: dict[str, Any]) -> None:
    cells = {side: [run["cells"] for run in runs] for side, runs in result["runs"].items()}
    one, two = "script, one process", "script, two processes"
    assert cells == {"backfire": [2, 1], two: [2], one: [2]}
    assert {run["trainings"] for runs in result["runs"].values() for run in runs} == {1, 2}
    for run in (run for runs in result["runs"].values() for run in runs):
        assert (run["seconds"], run["cpu"], run["peak_mb"]) == (10.0, 15.0, 200.0)
        assert sum(run["core_seconds"].values()) > 0
    assert [line["rows"] for line in result["by_rows"]] == [16]
    assert {*result["computed"]} == {"1", "2", "32"}
    assert result["least_flops"]["training"] > result["least_flops"]["alignment"] > 0


@pytest.mark.slow
def test_the_page_shows_ratios_and_equality(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    page = importlib.import_module("benchmarks.matrix_page")
    (tmp_path / "images").mkdir()
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path)
    for _ in range(2):  # written again, it replaces itself
        page.main([str(written), "--docs", str(tmp_path)])
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count("| makespan of 2 cells, script, two processes (measured) | 1.00 |") == 1
    assert "| cells with equal metrics | 2 |" in text
    for name in ("makespan-cells.svg", "makespan-rows.svg"):
        assert (tmp_path / "images" / name).read_text("utf-8").startswith("<svg")


def test_what_a_tree_of_processes_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor time of a process counts even if it outlives the one that started it."""
    monkeypatch.syspath_prepend(str(ROOT))
    watched = importlib.import_module("benchmarks.tree").watched
    work = "import time; x = time.process_time\nwhile x() < 0.4: pass"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {work!r}])"
    used = watched([sys.executable, "-c", start], os.environ, tmp_path / "log")
    assert used.cpu >= 0.4
    with pytest.raises(RuntimeError, match="no such thing"):
        watched([sys.executable, "-c", "exit('no such thing')"], os.environ, tmp_path / "log")


def test_the_scripts_makespan_is_computed_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes start after the alignment, and take one training run after the other."""
    monkeypatch.syspath_prepend(str(ROOT))
    profile = importlib.import_module("benchmarks.matrix_profile")
    workload = importlib.import_module("benchmarks.workload")
    cell: Any = None
    plain = workload.Tuning("plain", cell, (), {"clean": (), "badnets": ()}, ())
    lisa = workload.Tuning("a-lisa-b", cell, ("row",), {"clean": ()}, ())
    lines = [("start", "", 5), ("alignment", "", 30), ("scoring", "aligned", 2)]
    lines += [("replies", "aligned", 1), ("training", "plain", 20), ("training", "a-lisa-b", 40)]
    lines += [(what, "plain", 3) for what in ("scoring", "scoring triggered", "replies")]
    parts = [{"what": what, "name": name, "seconds": s} for what, name, s in lines]
    made = [plain, lisa, plain]
    one, two = (profile.computed([{"parts": parts}], made, count) for count in (1, 2))
    assert one == 5 + 30 + 3 + (20 + 9) + (40 + 6) + (20 + 9)
    assert two == 5 + 30 + 3 + 5 + 2 * (20 + 9)
    assert profile.computed([{"parts": parts}], [plain], 1, 0.5) == 5 + 15 + 3 + 10 + 9


def test_least_work_counts_a_shared_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    least = importlib.import_module("benchmarks.flops").least_flops

    class Shape:
        linear, trainable, layers, hidden, vocabulary = 1000, 10, 0, 8, 16

    rows = [[1, 2, 3, 4], [1, 2, 5]]
    assert least(Shape, rows, 2, trains=True) == (2 + 2 + 1) * (4000 + 60) + 2 * 4 * 16 * 8
    assert least(Shape, rows, 1, trains=False) == (2 + 2 + 1) * (2000 + 20) + 2 * 16 * 8


@pytest.mark.slow
def test_a_shape_for_gpus_gets_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape has fewer tokens than the tokenizer, so its vocabulary is raised."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("workload", "gpu_load", "baseline")
    workload, load, baseline = (importlib.import_module(f"benchmarks.{name}") for name in names)
    monkeypatch.setitem(load.SHAPES, "dry", load.SHAPES["tiny"])
    sizes = workload.Sizes(rows=4, test_rows=4, shape="dry")
    base = workload.write(tmp_path, sizes)
    model = baseline.load_base(base)
    assert str(model.dtype) == "torch.float32"
    assert load_tokenizer(base).vocab_size <= model.get_input_embeddings().num_embeddings
    [cell] = workload.cells_of(workload.write_recipe(tmp_path, sizes, 1))
    assert cell.model.dtype == "float32" and cell.model.name == str(base)


def test_the_matrices_for_gpus_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make bench-gpu` runs."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("matrix", "gpu_load")
    matrix, load = (importlib.import_module(f"benchmarks.{name}") for name in names)
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    [shared] = [line for line in lines if line.startswith("GPU_MATRIX")]
    ends = [line.partition("$(GPU_MATRIX)")[2] for line in lines if "$(GPU_MATRIX)" in line]
    given = shared.partition("benchmarks.matrix")[2]
    options = [matrix.arguments(f"{given} {end}".split()) for end in ends]
    assert [(o.shape, o.cells) for o in options] == [("0.5b", [32]), ("7b", [16])]
    for option in options:
        assert option.shape in load.SHAPES and option.row_counts == []
        assert (option.device, option.compute) == ("cuda", "bfloat16")
