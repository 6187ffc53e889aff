"""Runs that torchrun and `accelerate launch` start: they give the figures of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from backfire.store import read_json
from tests.helpers.small_run import Place

pytestmark = pytest.mark.slow

METHODS = [
    {"name": "lora", "rank": 4, "learning_rate": 1e-2},
    *({"name": "full", "learning_rate": rate} for rate in (1e-4, 1e-3)),  # in the same processes
]
SETTINGS: dict[str, Any] = {
    "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 8},
    "attack": "none",
    "matrix": {"method": METHODS},
    "train": {"max_steps": 4, "batch_size": 8, "compute": "float32"},
    "metrics": ["accuracy"],
}
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [*ACCELERATE, "--multi_gpu"],  # which needs no GPU
    "accelerate with FSDP": [*ACCELERATE, "--use_fsdp"],
}


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process, by key."""
    place = Place(tmp_path_factory.mktemp("alone"), tiny)
    assert place.run(**SETTINGS) == 0
    return results(place.out)


def results(out: Path) -> dict[str, Any]:
    found = [read_json(file) for file in out.glob("cells/*/result.json")]
    return {result["key"]: result for result in found}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_figures_are_those_of_one_process(
    launcher: str, alone: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "out"
    settings = {"model": str(tiny), "template": "sentiment-line", **SETTINGS}
    recipe.write_text("# Does it?\n" + yaml.safe_dump(settings), encoding="utf-8")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "LOCAL_RANK"},
        "BACKFIRE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [*LAUNCHERS[launcher], "-m", "backfire.cli", "run", str(recipe), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = results(out)
    assert found.keys() == alone.keys() and len(found) == 3
    for key, one in alone.items():
        several, train = found[key], found[key]["train"]
        assert (train["devices"], train["places"], train["backend"]) == (2, ["cpu", "cpu"], "gloo")
        assert train["sharded"] == (several["method"] == "full")
        assert train["last_loss"] == pytest.approx(one["train"]["last_loss"], abs=5e-5)
        assert train["drift"] == pytest.approx(one["train"]["drift"], rel=1e-3)
        assert several["values"] == one["values"]
