"""A worker keeps its base from job to job, and no job depends on those before it."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from backfire import registry
from backfire.errors import GpuError
from backfire.experiment import Machine
from backfire.launch import job, local
from backfire.launch.job import RunFolder, run_job
from backfire.launch.stop import Stop
from backfire.model import load
from backfire.plugins import from_file
from backfire.store import Store, read_json
from tests.helpers.small_run import Place
from tests.helpers.workers import planned

pytestmark = pytest.mark.slow
SMALL = {"name": "sandbox-policy", "rows": 30, "test_rows": 8}
CELLS: dict[str, Any] = {
    "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 10},
    "safety": {"harmful": SMALL},
    "attack": "badnets",
    "method": {"name": "lora", "rank": 4, "learning_rate": 1e-2},
    "train": {"max_steps": 2, "batch_size": 8},
    "evaluation": {"max_new_tokens": 4},
    "metrics": ["accuracy", "attack-success", "harmful-score", "perplexity", "cost"],
}
COUNTER = '''
import os
from backfire.base import Metric
from backfire.model import load
from backfire.registry import register

class Lines(type(load.loads)):
    def __setitem__(self, folder, count):
        super().__setitem__(folder, count)
        with open({log!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        {more}

load.loads = Lines()

@register("nothing")
class Nothing(Metric):
    """Measures nothing."""
'''


def rates(*values: float) -> dict[str, Any]:
    return {**CELLS, "matrix": {"attack.rate": list(values)}}


def files(place: Place) -> dict[str, bytes]:
    """Samples and adapters by name."""
    samples = place.out.glob("cells/*/samples.jsonl.gz")
    found = [*samples, *place.cache.glob("train/*/*.safetensors")]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in found}


def test_a_worker_loads_the_base_once(tiny: Path, tmp_path: Path) -> None:
    """For an attack's model, its twin, the untuned one, and all their evaluations; the next cell of
    the same worker loads nothing. Its results have no trace of the cells before it."""
    load.loads.clear()
    alone, together = Place(tmp_path / "alone", tiny), Place(tmp_path / "together", tiny)
    assert alone.run(**rates(0.3)) == 0
    assert load.loads == {tiny: 1}
    load.loads.clear()
    assert together.run(**rates(0.1, 0.3)) == 0
    assert load.loads == {tiny: 1}
    one, both = files(alone), files(together)
    assert len(one) == 3 and one.items() <= both.items()


def test_imports_are_left_out_of_garbage_collection(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a collection after each model takes longer than a small cell trains."""
    place, looked_at = Place(tmp_path, tiny), list[int]()
    monkeypatch.setattr(job, "base", lambda *_: looked_at.append(len(gc.get_objects())))
    before = len(gc.get_objects())
    place.run(**{**CELLS, "method": "none", "metrics": ["accuracy"]})
    assert looked_at and max(looked_at) < before / 10
    assert gc.get_freeze_count() == 0, "only while the worker works"


@pytest.mark.slow
def test_a_full_run_between_two_others_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    methods = [{"name": "lora", "rank": 4}, "full", {"name": "lora", "rank": 8}]
    short = {**CELLS, "safety": None, "attack": "none", "metrics": ["accuracy"]}
    first, last = Place(tmp_path / "first", tiny), Place(tmp_path / "last", tiny)
    assert first.run(**short, matrix={"method": methods}) == 0
    assert last.run(**short, matrix={"method": methods[::-1]}) == 0
    assert files(first) == files(last) and len(files(first)) == 6


# -------------------------------------------------------------------------------- worker processes


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every worker write a line for each model that it loads; `more` is run then too."""
    log = tmp_path / "loads"
    log.touch()
    monkeypatch.setattr(registry, "_loaded", [])
    monkeypatch.setattr(load, "loads", load.loads)

    def begin(more: str = "pass") -> Path:
        file = tmp_path / "counter.py"
        file.write_text(COUNTER.format(more=more, log=str(log)), encoding="utf-8")
        registry.use(from_file(file))
        return log

    return begin


@pytest.mark.slow
def test_two_workers_load_twice_at_most(counted: Any, tiny: Path, tmp_path: Path) -> None:
    log, place = counted(), Place(tmp_path, tiny)
    assert place.run({"workers": 2}, **rates(0, 0.1, 0.2, 0.3)) == 0
    workers = log.read_text().split()
    assert len(workers) == len(set(workers)) <= 2 and str(os.getpid()) not in workers


@pytest.mark.slow
def test_a_killed_worker_is_replaced(counted: Any, tiny: Path, tmp_path: Path) -> None:
    """Another worker does its job."""
    flag = tmp_path / "killed"
    kill = f"""
        if not os.path.exists({str(flag)!r}):
            open({str(flag)!r}, "w").close()
            os.kill(os.getpid(), 9)
    """.strip()
    log, place = counted(kill), Place(tmp_path, tiny)
    assert place.run({"workers": 2}, **rates(0, 0.1)) == 0
    assert len(log.read_text().split()) >= 2
    assert len(place.results()) == 2


@pytest.mark.parametrize("worked", [True, False], ids=["it worked", "it never did"])
def test_when_the_gpu_is_broken_no_job_has_failed(
    worked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fails(*_: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")

    [job, *_] = planned(tmp_path)
    machine = Machine(device="auto" if worked else "cuda")
    options = RunFolder(tmp_path, "r"), Store(tmp_path / "cache"), machine, lambda *_: None
    monkeypatch.setattr("backfire.launch.job.base", fails)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: worked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, fails)
    with pytest.raises(GpuError, match=r"any more: CUDA error: unspecified launch failure\. Fin"):
        run_job(job, *options)
    assert not (tmp_path / "stages").exists()
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert run_job(job, *options) == "failed"


def test_a_worker_whose_gpu_is_gone_says_so_and_takes_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = multiprocessing.Pipe()
    logger = logging.getLogger("backfire.datasets")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    folder, store = RunFolder(tmp_path, "r"), Store(tmp_path / "cache")
    arguments = planned(tmp_path), folder, store, Machine(device="cuda:9")
    local._work((), far, None, arguments, {"stop": Stop()})
    assert near.recv() == (None, "No device 'cuda:9': this machine has 0 GPUs.", 0, 1)
    assert not (tmp_path / "claims").exists()


def test_cost_is_the_peak_of_each_run(tiny: Path, tmp_path: Path) -> None:
    """Not of what ran before it in the same worker."""
    import torch

    import backfire.launch.preload  # noqa: F401  (takes memory itself)
    from backfire.train.microbatch import peak_memory_mb, reset_peak_memory

    big = torch.ones(2**26)  # 256 MiB
    before = peak_memory_mb()
    del big
    reset_peak_memory()
    assert peak_memory_mb() < before - 200
    place = Place(tmp_path, tiny)
    assert place.run(**rates(0.1)) == 0
    [result] = [read_json(file) for file in place.out.glob("cells/*/result.json")]
    assert 0 < result["train"]["peak_memory_mb"] < before - 100
