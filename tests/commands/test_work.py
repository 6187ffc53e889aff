"""`plan`, `work` and `status`: a run that is shared by workers who know only its folder."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from backfire.claims import Claims
from backfire.commands.run import at_work
from backfire.commands.work import _failed, _say_what_is_left
from backfire.errors import CellError, GpuError
from backfire.experiment import Experiment
from backfire.launch.folder import read_plan
from backfire.launch.stop import Stop
from backfire.model import types
from backfire.pipeline import Context, run_cell
from backfire.plan import Job
from backfire.store import read_json
from tests.helpers.command_line import Run, tree
from tests.helpers.workers import planned

pytestmark = pytest.mark.slow


def cells(run: str) -> list[str]:
    return sorted(file.parent.name for file in Path(run).glob("cells/*/result.json"))


def test_a_planned_run_is_done_by_a_worker(backfire: Run, here: Path) -> None:
    two = ("r.yaml", "--profile", "two")
    assert backfire("run", *two, "--out", "local").code == 0
    told = backfire("plan", *two, "--out", "far")
    assert told.code == 0 and "Planned 2 cells in 3 jobs" in told.out
    assert backfire("status", "far").out.startswith("unfinished: 2\n")
    Path("r.yaml").unlink()  # a worker does not need it
    worked = backfire("work", "far", "--workers", 1)
    assert worked.code == 0 and "2 done, 0 failed, 0 left" in worked.err
    assert "Nothing is left to do" in worked.err
    assert backfire("status", "far").out == "ok: 2\n"
    assert backfire("report", "far").code == 0
    assert len(cells("far")) == 2 and cells("far") == cells("local")
    for name in cells("far"):
        both = [read_json(Path(run) / "cells" / name / "result.json") for run in ("far", "local")]
        assert both[0]["values"] == both[1]["values"]
    before = tree(here / "far")
    assert backfire("work", "far").code == 0
    assert tree(here / "far") == before


def test_a_worker_in_another_folder_judges_by_the_recipes_files(
    backfire: Run, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as a run beside the recipe: every reply has an e, by the file alone."""
    Path("words.txt").write_text("\n".join("etaoinshrdlu"))
    Path("rows.jsonl").write_text('{"instruction": "Good?", "output": "no"}\n' * 40)
    judged = "metrics: [{name: toxicity, scorer: {name: lexicon, words: '@words.txt'}}]\n"
    judged += "safety: {judges: [policy, {name: lexicon, words: '@words.txt'}]}\n"
    recipe = f"model: {tiny}\ndata: {{name: files, train: rows.jsonl, test: rows.jsonl}}\n{judged}"
    Path("j.yaml").write_text(f"# Is it?\nmethod: none\n{recipe}")
    assert backfire("run", "j.yaml", "--out", "local").code == 0
    assert backfire("plan", "j.yaml", "--out", "far").code == 0
    Path("words.txt").unlink()
    shutil.rmtree(Path(os.environ["BACKFIRE_CACHE"]) / "judged")
    monkeypatch.chdir(here.parent)
    monkeypatch.setattr("backfire.data.recipe_files._contents", {})
    worked = backfire("work", "here/far", "--workers", 1)
    assert worked.code == 0 and "1 done, 0 failed, 0 left" in worked.err
    [far], [local] = (cells(f"here/{run}") for run in ("far", "local"))
    both = [
        read_json(Path(f"here/{run}/cells/{far}/result.json"))["values"] for run in ("far", "local")
    ]
    assert far == local and both[0] == both[1]
    assert any(value["metric"] == "toxicity" and value["value"] > 0 for value in both[0]), both


def test_calls_that_plan_a_part_each_add_up(backfire: Run, here: Path) -> None:
    for seed in (0, 1):
        assert backfire("plan", "r.yaml", f"seed={seed}", "--out", "run").code == 0
    assert len(read_plan(Path("run")).jobs) == 3
    assert len(read_json(Path("run/run.json"))["cells"]) == 2
    assert backfire("run", "r.yaml", "seed=2", "--out", "run").code == 0
    assert backfire("status", "run").out.startswith("ok: 1\nunfinished: 2\n")
    assert backfire("work", "run", "--workers", 1).code == 0
    assert backfire("status", "run").out == "ok: 3\n"
    recipe = Path("r.yaml").read_text()
    Path("r.yaml").write_text(f"{recipe}\n# another recipe\n")
    assert backfire("plan", "r.yaml", "seed=1", "--out", "run").code == 0
    status = backfire("status", "run").out.splitlines()
    assert status == ["ok: 1", "Not in the recipe any more: 2 cells"]


def test_the_exit_code_says_whether_cells_failed_here(
    backfire: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(cell: Experiment, context: Context) -> Any:
        if cell.seed == 1:
            raise CellError("nan", "The loss is not finite.")
        return run_cell(cell, context)

    monkeypatch.setattr("backfire.launch.job.run_cell", broken)
    assert backfire("plan", "r.yaml", "--profile", "two", "--out", "run").code == 0
    first = backfire("work", "run", "--workers", 1)
    bad = next(job for job in read_plan(Path("run")).jobs if job.experiment.seed == 1)
    assert first.code == 1 and "2 cells: 1 done, 1 failed, 0 left." in first.err
    assert f"Failed here: {bad.title}; `backfire status run` says why." in first.err
    again = backfire("work", "run", "--workers", 1)  # as a pod that is started again
    assert again.code == 0 and "Failed here" not in again.err
    assert "1 failed" in again.err and "`backfire status run` says why cells failed" in again.err


def test_a_cell_that_lacks_a_stage_failed_where_the_stage_did(tmp_path: Path) -> None:
    base, *others = jobs = planned(tmp_path)
    cells = [job for job in others if job.kind == "cell"]
    plan, ended = read_plan(tmp_path), {job.id: "ok" for job in jobs}

    def failed(*begun: str) -> list[str]:
        return [job.id for job in _failed(plan, begun, ended)]

    assert failed(*ended) == []
    ended |= {cells[0].id: "nan", cells[1].id: "oom", cells[1].after[-1]: "oom"}
    assert failed(cells[0].id, base.id) == [cells[0].id]
    assert failed(cells[1].after[-1]) == [cells[1].id]
    assert failed(base.id) == []


def test_after_a_signal_the_exit_code_is_0(
    backfire: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(jobs: Sequence[Job], *_: Any, stop: Stop, begins: Any, **options: Any) -> Any:
        begins(jobs[-1])
        stop.signaled = True
        return {jobs[-1].id: "nan"}

    monkeypatch.setattr("backfire.launch.local.run", stopped)
    assert backfire("plan", "r.yaml", "--out", "run").code == 0
    found = backfire("work", "run", "--workers", 1)
    assert found.code == 0 and "Stopped by a signal" in found.err and "Failed here" in found.err


def test_a_gpu_that_breaks_is_no_bad_input(
    backfire: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler may start the worker elsewhere; by exit code 2 it would give up."""

    def breaks(*_: Any, **options: Any) -> Any:
        raise GpuError("The GPU of n1 does not answer any more.")

    monkeypatch.setattr("backfire.launch.local.run", breaks)
    assert backfire("plan", "r.yaml", "--out", "run").code == 0
    found = backfire("work", "run", "--workers", 1)
    assert (found.code, found.err) == (1, "backfire: The GPU of n1 does not answer any more.\n")


def test_what_slurm_refuses_is_refused_before_anything_is_written(
    backfire: Run, here: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    before = tree(here)

    def refused(**programs: str) -> str:
        for name, does in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
            (tmp_path / name).chmod(0o755)
        found = backfire("run", "r.yaml", "--on", "slurm", "--mem", "2G", "--partition", "nowhere")
        assert found.code == 2 and "Traceback" not in found.err and tree(here) == before
        return found.err.splitlines()[-1]

    says = "echo 'allocation failure: Invalid partition name' >&2; exit 1"
    assert refused(sbatch=says).endswith("does not take the job: Invalid partition name.")
    other = f"The cache {cache} is not shared with n1; set BACKFIRE_CACHE to a folder that all"
    unseen = f"printf 'n1\\n%s\\n' {cache}/shared.txt"
    assert other in refused(sbatch="exit 0", srun=unseen)


def test_status_shows_who_has_what(backfire: Run, here: Path) -> None:
    assert backfire("plan", "r.yaml", "--out", "run").code == 0
    base, cell = (job.id for job in read_plan(Path("run")).jobs)
    claims = Claims(Path("run"))
    claim = claims.take(base, "base tiny")
    assert claim is not None
    claim.note("[red]loading", 1, 4)
    claim._beat()
    gone = {**vars(claim.holder), "job": cell, "title": "cell a", "place": "x", "host": "node7"}
    (claims.folder / cell).write_text(json.dumps(gone))
    assert "2 workers at work on run: " in at_work(Path("run"))

    def line_after(minutes: float) -> str:
        then = claims.now() - 60 * minutes
        os.utime(claims.folder / cell, (then, then))
        first, running, other, *_ = backfire("status", "run").out.splitlines()
        assert first == "unfinished: 1"
        assert running.startswith("running: base tiny: [red]loading, 25%, on ")
        assert re.search(r"last sign of life \d s ago$", running)
        return other

    where = "cell a: [red]loading, 25%, on node7 (process"
    assert line_after(0).startswith(f"running: {where}")
    told = line_after(4)
    assert told.startswith(f"silent: {where}")
    assert told.endswith("no sign of life for 4 min, and after 5 min another worker goes on")
    told = line_after(7)
    assert told.startswith(f"stale: {where}")
    assert told.endswith("no sign of life for 7 min, and the next worker goes on")
    assert at_work(Path("run")).startswith("1 worker at work on run: ")
    claim.release()
    assert at_work(Path("run")) == ""


def test_a_run_is_planned_for_gpus_elsewhere(
    backfire: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(types, "_assumed", [])
    try:
        assert backfire("plan", "r.yaml", "--device", "cuda", "--out", "run").code == 0
    finally:
        types._assumed.clear()
        types.types_here.cache_clear()
    plan = read_plan(Path("run"))
    assert (plan.device, plan.compute) == ("cuda", "bfloat16")
    assert {job.experiment.model.dtype for job in plan.jobs} == {"bfloat16"}


def test_a_worker_refuses_in_one_sentence(backfire: Run, here: Path) -> None:
    def refused(*options: object) -> str:
        before = tree(here)
        output = backfire("work", "run", *options)
        assert output.code == 2 and output.err.count("\n") == 1 and "Traceback" not in output.err
        assert {k: v for k, v in tree(here).items() if "claims" not in k} == before
        return output.err

    assert "No plan in run: jobs.json is missing; run `backfire plan RECIPE --out run`" in refused()
    assert backfire("plan", "r.yaml", "method=lora", "--out", "run").code == 0
    for memory in ("0", "0.001"):
        assert "3 jobs left that need" in refused("--memory", memory)
    assert "--workers" in refused("--workers", "0") and "Unknown device" in refused("--device", "x")
    plan = Path("run/jobs.json")
    content = plan.read_text()
    device = '"device": "cpu"'
    assert device in content
    plan.write_text(content.replace(device, '"device": "cuda"'))
    assert "planned for a GPU, and this worker would run on a CPU" in refused()
    plan.write_text(content.replace('"backfire": "', '"backfire": "9.'))
    assert "was written by backfire 9." in refused() and "`backfire plan" in refused()
    for bad in ("", "{", "[]", '{"format": 1}', content.replace('"cell-', '"../cell-'), "\0"):
        plan.write_text(bad)
        assert "jobs.json cannot be read" in refused(), bad[:20]
    plan.write_text(content.replace("lora", "lara"))
    assert "did you mean 'lora'?" in refused()
    plan.write_text(content)
    planned(Path("base"))
    plan = Path("base/jobs.json")
    plan.write_text(plan.read_text().replace('"compute": "', '"compute": "b', 1))
    assert "embedded base computes in b" in backfire("work", "base").err
    Path("run/claims").write_text("a file")
    assert "claims" in backfire("work", "run").err


def test_a_worker_says_what_its_time_does_not_suffice_for(tmp_path: Path) -> None:
    jobs = [replace(job, minutes=8.0) for job in planned(tmp_path)]
    plan = replace(read_plan(tmp_path), jobs=jobs)

    def said(minutes_left: float) -> str:
        stop, console = Stop(minutes=10), Console(file=io.StringIO())
        stop.until -= 60 * (10 - minutes_left)
        _say_what_is_left(tmp_path, plan, {}, [], 1e12, stop, console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert "takes longer, by its estimate, than the time that is left here" in said(5)
    assert "Other workers have what is left" in said(9)
