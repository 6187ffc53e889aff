"""The scripts of docs/cluster.md: their commands reach every worker."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command_line import Run
from tests.helpers.patience import LONG
from tests.helpers.snippets import snippet

RECIPE = """# Does it?
model: {tiny}
data: {{name: sandbox-reviews, rows: 20, test_rows: 8}}
template: sentiment-line
attack: none
method: none
metrics: [accuracy]
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a script with stubs: `backfire` notes its arguments and the GPU, `ssh HOST COMMAND` runs
    the command here, until nothing holds its output open."""
    programs = tmp_path / "programs"
    programs.mkdir()
    noted = tmp_path / "noted"
    stubs = {
        "backfire": f'echo "$@" gpu=$CUDA_VISIBLE_DEVICES >> {noted}',
        "ssh": f'until_all_is_closed=$(bash -c "$2"); echo "left $1" >> {noted}',
        "scontrol": f'echo scontrol "$@" >> {noted}',
        "nohup": '"$@"',
    }
    for name, body in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def run(script: str) -> list[str]:
        subprocess.run(["bash", "-c", f"{script}\nwait"], cwd=tmp_path, timeout=LONG)
        return noted.read_text().splitlines()

    return run


def test_each_gpu_gets_a_worker(shell: Any) -> None:
    noted = shell(snippet("cluster.md", "CUDA_VISIBLE_DEVICES=$gpu"))
    assert noted[0] == "plan lisa --profile paper --out runs/study gpu="
    assert sorted(noted[1:5]) == [f"work runs/study --workers 1 gpu={n}" for n in range(4)]
    assert noted[5:] == ["report runs/study gpu="]


def test_each_host_gets_a_worker_that_outlives_the_connection(shell: Any, tmp_path: Path) -> None:
    stub = tmp_path / "programs/backfire"
    left = '[ "$1" != work ] || until grep -q "left second" noted; do sleep 0.05; done'
    stub.write_text(stub.read_text().replace("echo", f"{left}; echo"))
    both_worked = "until [ $(grep -c ^work noted) = 2 ]; do sleep 0.05; done"
    noted = shell(f"{snippet('cluster.md', 'ssh ')}{both_worked}")
    assert noted[1:3] == ["left first", "left second"]
    assert noted[3:] == ["work runs/study gpu="] * 2
    assert (tmp_path / "first.log").is_file()


def test_the_array_script_requeues_at_the_signal(
    shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    waiting = 'trap "echo stopped >> noted; exit" USR1; sleep 0.3; kill -USR1 $PPID; sleep 9 & wait'
    (tmp_path / "programs/backfire").write_text(f"#!/bin/bash\n{waiting}\n")
    assert shell(snippet("cluster.md", "#SBATCH --array")) == ["stopped", "scontrol requeue 7"]


def test_the_kubernetes_job_is_indexed_and_has_what_a_worker_needs(
    backfire: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = yaml.safe_load(snippet("cluster.md", "kind: Job"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (worker,) = pod["containers"]
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert {mount["name"] for mount in worker["volumeMounts"]} == {pod["volumes"][0]["name"]}
    root = worker["volumeMounts"][0]["mountPath"]
    variables = {one["name"]: one["value"] for one in worker["env"]}
    assert all(value.startswith(root) for value in variables.values())
    program, verb, run = worker["command"]
    assert (program, verb, run.startswith(root)) == ("backfire", "work", True)
    # The volume is a folder here: the pod's command line does a planned run.
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(tiny=tiny))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace(root, str(tmp_path)))
    run = run.replace(root, str(tmp_path))
    assert backfire("plan", recipe, "--out", run).code == 0
    found = backfire(verb, run)
    assert (found.code, "1 done, 0 failed, 0 left" in found.err) == (0, True)
