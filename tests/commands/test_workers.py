"""The default number of workers: by GPUs, cores and memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from backfire import resources
from backfire.commands import forecast
from backfire.commands.cluster import Asked, _memory
from backfire.commands.run import on_device
from backfire.commands.workers import SMALL, default_workers, largest, on_devices
from backfire.errors import UserError
from backfire.experiment import Machine
from backfire.model.types import Types, types_here
from backfire.plan import Job
from backfire.recipe import load

CPU, TYPES = Machine(device="cpu"), Types("cpu", "float32", "float32")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Eight cores, 10 GB of memory, two GPUs."""
    types_here()  # kept for later tests, so it must not see these GPUs
    here = SimpleNamespace(cores=8, ram_bytes=10e9, free_bytes=10e9, gpus=["0", "1"])
    monkeypatch.setattr(resources, "has_gpu", lambda: bool(here.gpus))
    for name in vars(here):
        monkeypatch.setattr(resources, name, lambda name=name: getattr(here, name))
    return here


def test_one_worker_per_core_as_long_as_they_fit(machine: SimpleNamespace) -> None:
    assert default_workers(20, CPU) == 8
    assert default_workers(5, CPU) == 5
    assert default_workers(20, CPU, need=2e9) == 4, "the prediction has an error"
    machine.free_bytes = 0.1e9
    assert default_workers(20, CPU) == 1, "the system may free more"


def test_one_worker_per_visible_gpu(machine: SimpleNamespace) -> None:
    for device in ("auto", "cuda"):
        assert default_workers(20, Machine(device=device), need=1e12) == 2, (
            "of the machine's own memory"
        )
    assert default_workers(20, Machine(device="cuda:1")) == 1
    machine.gpus = []  # of another maker
    assert default_workers(20, Machine(device="cuda")) == 1


def test_not_even_one_fits(machine: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"The cell x needs about 12\.0 GB.* may use 10\.0 GB\. `b"):
        default_workers(20, CPU, need=12e9, title="x")


def test_the_largest_cell_decides(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, needs = load("tour", edits=["model.name=nobody/none"]), [1e9, None, 3e9]

    def found(self: Any, settings: Machine) -> Any:
        for cell, need in zip(recipe.cells, needs, strict=False):
            yield cell, need and SimpleNamespace(total=need * (0.5 if settings.recompute else 1))

    monkeypatch.setattr(forecast.Forecast, "__init__", lambda *args: None)
    monkeypatch.setattr(forecast.Forecast, "largest", found)
    assert largest(recipe, TYPES, Machine()) == (3e9, recipe.cells[2].slug)
    assert largest(recipe, TYPES, Machine(recompute=True)) == (1.5e9, recipe.cells[2].slug)
    needs[:] = [None]
    assert largest(recipe, TYPES, Machine()) == (SMALL, recipe.cells[0].slug)
    assert largest(load("tour"), TYPES, Machine()) == (SMALL, load("tour").cells[0].slug)


def test_each_of_several_devices_holds_the_whole_base_or_a_part_of_it() -> None:
    full, lora = (load("tour", edits=["matrix=null", f"method={m}"]) for m in ("full", "lora"))
    work = [Job("a", "train", one.cells[0], {}, memory=8e9) for one in (full, lora)]
    for count, need in {1: 8e9, 2: 4e9, 4: 2e9, 8: 2e9}.items():
        assert [job.memory for job in on_devices(work, count)] == [need, 8e9], (
            "sharded weights load whole"
        )
    unknown = [replace(job, memory=None) for job in work]
    assert on_devices(unknown, 2) == unknown
    for devices, least in {1: 2 * 8e9, 2: 4 * 4e9, 4: 8 * 2e9}.items():  # two cells at once
        asked = Asked("slurm", mem=f"{-(-least // 2**20):.0f}")
        assert _memory(asked, on_devices(work[:1], devices), 2 * devices) == pytest.approx(
            least, abs=2**20
        )


def test_the_ranks_of_a_worker_share_the_memory_of_a_cpu(machine: SimpleNamespace) -> None:
    pair = Machine(device="cpu", devices=2)
    assert default_workers(20, pair, need=1e9) == 4
    assert default_workers(20, pair, need=4e9) == 1
    with pytest.raises(UserError):
        default_workers(20, pair, need=6e9)


def test_a_gpu_that_auto_has_found_stays_the_device() -> None:
    gpu = TYPES._replace(device="cuda")
    assert on_device(Machine(), gpu).device == "cuda"
    assert on_device(Machine(device="cuda:1"), gpu).device == "cuda:1"
    assert on_device(Machine(), TYPES).device == "auto"
