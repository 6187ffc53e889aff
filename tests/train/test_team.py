"""Whole runs on several devices: the processes, their tasks, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire import registry
from backfire.errors import CellError, UserError
from backfire.experiment import Machine
from backfire.plugins import from_file
from backfire.store import read_json
from backfire.train import devices, group, members, team
from tests.helpers.command_line import Output
from tests.helpers.patience import LONG
from tests.helpers.ports import free_port
from tests.helpers.small_run import Place

LORA = {"name": "lora", "rank": 4, "learning_rate": 1e-2}
SETTINGS: dict[str, Any] = {
    "data": {"name": "sandbox-reviews", "rows": 60, "test_rows": 8},
    "attack": "none",
    "method": LORA,
    "train": {"max_steps": 6, "batch_size": 8, "compute": "float32"},
    "metrics": ["accuracy"],
}
MURDER = """
import os, signal
from pathlib import Path
from backfire.base import TrainDefense, TrainHook
from backfire.registry import register

@register("murder")
class Murder(TrainDefense):
    '''Kills the second rank, once.'''

    def hook(self, run):
        class Hook(TrainHook):
            def after(self, step):
                if run.ranks.rank == 1 and step == 3 and not Path({flag!r}).exists():
                    Path({flag!r}).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
        return Hook()
"""
HUNGER = """
from backfire.base import TrainDefense, TrainHook
from backfire.registry import register

@register("hunger")
class Hunger(TrainDefense):
    '''From the third step on, the second rank has memory for two rows.'''

    def hook(self, run):
        class Hook(TrainHook):
            def weigh(self, losses, labels, rows, logits):
                if run.ranks.rank == 1 and run.step >= 2 and len(rows) > 2:
                    raise MemoryError
                return losses
        return Hook()
"""


STUMBLE = """
from pydantic import Field
from backfire.base import TrainDefense, TrainHook
from backfire.errors import CellError
from backfire.registry import register

@register("stumble")
class Stumble(TrainDefense):
    '''One rank fails in the second step.'''

    who: int = Field(0, description="The rank.")
    shards = True

    def hook(self, run):
        class Hook(TrainHook):
            def weigh(hook, losses, labels, rows, logits):
                if run.step == 1 and run.ranks.rank == self.who:
                    raise CellError("nan", f"Rank {self.who} stumbles.")
                return losses
        return Hook()
"""


@pytest.fixture
def _disbanded() -> Iterator[None]:
    yield
    team._disband()


def losses(place: Place) -> list[float]:
    (file,) = place.cache.glob("train/*/train.jsonl")
    return [json.loads(line)["loss"] for line in file.read_text("utf-8").splitlines()]


def result(place: Place, name: str = "result.json") -> Any:
    (file,) = place.out.glob(f"cells/*/{name}")
    return read_json(file)


@pytest.mark.slow
@pytest.mark.usefixtures("_disbanded")
def test_a_killed_rank_fails_the_cell_and_the_next_run_resumes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_loaded", [])
    file = tmp_path / "murder.py"
    file.write_text(MURDER.format(flag=str(tmp_path / "flag")), encoding="utf-8")
    registry.use(from_file(file))
    settings = {**SETTINGS, "defense": "murder"}
    alone, both = Place(tmp_path / "alone", tiny), Place(tmp_path / "both", tiny)
    assert alone.run(**settings) == 0
    machine = {"devices": 2, "checkpoint_seconds": 0.0}
    assert both.run(machine, **settings) == 1
    error = result(both, "error.json")
    assert error["status"] == "killed"
    assert error["error"] == "Rank 1 of 2 was killed by signal 9 while training."
    (checkpoints,) = both.cache.glob("train/*.partial*/checkpoints")
    assert {file.name for file in checkpoints.glob("0*")} == {"00000003", "00000004"}
    assert both.run(machine, **settings) == 0
    assert losses(both) == pytest.approx(losses(alone), abs=5e-5)
    summary = result(both)["train"]
    assert (summary["devices"], summary["places"]) == (2, ["cpu", "cpu"])
    assert (summary["backend"], summary["sharded"]) == ("gloo", False)
    assert result(both, "environment.json")["devices"] == 2
    assert "devices" not in {**result(alone)["train"], **result(alone, "environment.json")}
    assert result(both)["key"] == result(alone)["key"]


@pytest.mark.slow
@pytest.mark.usefixtures("_disbanded")
def test_shared_weights_start_again_with_fewer_rows_when_memory_runs_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_loaded", [])
    file = tmp_path / "hunger.py"
    file.write_text(HUNGER, encoding="utf-8")
    registry.use(from_file(file))
    settings = {**SETTINGS, "method": "full", "defense": "hunger"}
    alone, both = Place(tmp_path / "alone", tiny), Place(tmp_path / "both", tiny)
    assert alone.run(**settings) == 0
    tried, train = list[Any](), team._Team.train

    def spy(self: Any, task: Any, *rest: Any) -> dict[str, Any]:
        saved = sorted(file.name for file in task.folder.glob("checkpoints/0*"))
        tried.append((task.machine.micro_batch, saved))
        return train(self, task, *rest)

    monkeypatch.setattr(team._Team, "train", spy)
    assert both.run({"devices": 2, "checkpoint_seconds": 0.0}, **settings) == 0
    assert tried == [(None, []), (2, ["00000001", "00000002"])]
    assert losses(both) == pytest.approx(losses(alone), abs=5e-5)
    assert result(both)["train"]["sharded"]


@contextmanager
def started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """This process is the first of two ranks; yields the other one's process."""
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "backfire.cli", "run", "tour"]
    environment = {**os.environ, **names, "RANK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen(command, env=environment)
    for name, value in {**names, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        yield other
    finally:
        team._disband()
        other.terminate()
        other.wait(LONG)


@pytest.mark.slow
def test_ranks_that_torchrun_started_serve_the_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, tiny)
    matrix = {"method": [LORA, "full"]}
    with started_by_torchrun(monkeypatch) as other:
        assert place.run(**SETTINGS, matrix=matrix) == 0
        found = [read_json(file)["train"] for file in place.out.glob("cells/*/result.json")]
        assert [train["devices"] for train in found] == [2, 2]
        assert sorted(train["sharded"] for train in found) == [False, True]
        team._disband()
        assert other.wait(LONG) == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_fails_leaves_no_other_waiting(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the second rank, then the first; each is in the middle of a step of sharded weights.
    The ranks that torchrun started train the next cells."""
    monkeypatch.setattr(registry, "_loaded", [])
    file = tmp_path / "stumble.py"
    file.write_text(STUMBLE, encoding="utf-8")
    registry.use(from_file(file))
    place, stumbles = Place(tmp_path, tiny), [{"name": "stumble", "who": who} for who in (1, 0, 9)]
    with started_by_torchrun(monkeypatch):
        assert place.run(**{**SETTINGS, "method": "full"}, matrix={"defense": stumbles}) == 2
    errors = [read_json(file) for file in place.out.glob("cells/*/error.json")]
    assert sorted((e["status"], e["error"]) for e in errors) == [
        ("nan", "Rank 0 stumbles."),
        ("nan", "Rank 1 stumbles."),
    ]
    assert result(place)["train"]["sharded"]


def test_a_rank_that_does_not_join_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_TO_JOIN", 0.1)
    store, machine = torch.distributed.HashStore(), Machine.make({"device": "cpu", "devices": 3})
    store.set("place 1 1", "there")
    with (
        pytest.raises(CellError, match="Rank 2 of 3 did not join the others in time") as error,
        group.joined(store, 1, 0, 3, machine, lambda: None),
    ):
        pass
    assert error.value.kind == "killed"


@pytest.mark.parametrize("stray", ["WORLD_SIZE", "RANK", "MASTER_ADDR"])
def test_a_stray_variable_is_no_rendezvous(stray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices._RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(stray, "4")
    assert devices.launched() is None and not members.serves()


def test_accelerate_that_starts_one_process_instead_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in devices._RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as `accelerate launch --cpu` sets it
    devices.check(Machine())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert refused({}).startswith("accelerate launch --cpu starts one process, whatever")
    devices.check(Machine.make({"device": "cpu", "devices": 2}))


def refused(machine: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        devices.check(Machine.make(machine))
    return str(error.value)


def test_devices_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from backfire.model import load

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(load, "device_of", torch.device)
    machine = {"device": "cuda", "devices": 4}
    assert refused(machine) == "--devices 4: this machine has 2 GPUs."
    assert refused({**machine, "device": "cuda:1"}) == (
        "--device cuda:1 is one device; with --devices 4 use cuda."
    )
    devices.check(Machine.make({"device": "cuda", "devices": 2}))
    devices.check(Machine.make({"device": "cpu", "devices": 4}))
    names = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert "3 ranks were started" in refused({"device": "cpu", "devices": 2})
    assert "leave --workers out" in refused({"device": "cpu", "devices": 3, "workers": 2})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("method={name: full, dtype: bfloat16}", "dtype bfloat16 trains on one device"),
        ("train.optimizer=adamw-8bit", "optimizer adamw-8bit trains on one device"),
        ("train.compute=float16", "compute float16 trains on one device"),
        ("defense=dp", "defense 'dp' trains on one device; use method lora."),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_the_start(
    edit: str, words: str, backfire: Callable[..., Output], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    edits = ["method=full", edit] if "method" not in edit else [edit]
    found = backfire("run", "tour", "matrix=null", *edits, "--devices", 2, "--out", out)
    assert found.code == 2
    assert words in found.err and found.err.count("\n") <= 2
    assert not out.exists()
