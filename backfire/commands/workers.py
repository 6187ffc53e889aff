"""How many workers a run has by default: one per visible GPU, or as many as cores and memory
allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backfire import resources
from backfire.commands.estimate import amount
from backfire.errors import UserError
from backfire.experiment import Machine
from backfire.model.types import Types
from backfire.plan import Job
from backfire.recipe import Recipe
from backfire.train.devices import share

TIGHT = 0.85
"""Share of the memory above which the error of the prediction matters."""
SMALL = 0.53e9
"""Bytes of a worker with the embedded base, with its libraries."""


def default_workers(
    num_cells: int, machine: Machine, *, need: float = SMALL, title: str = ""
) -> int:
    """The number of workers for so many cells, each of which needs up to `need` bytes on each of
    its devices.

    Raises:
        UserError: not even one fits into the memory that this process may use.
    """
    most, need = workers_by_device(num_cells, machine), need * machine.devices
    if _on_gpu(machine.device):
        return most
    if need > resources.ram_bytes():
        what = f"The cell {title}" if title else "The largest cell"
        raise UserError(
            f"{what} needs about {amount(need)} of memory, and this process may use "
            f"{amount(resources.ram_bytes())}. `backfire doctor RECIPE` says what would fit; "
            "`--workers 1` runs it all the same."
        )
    return max(1, min(most, int(TIGHT * resources.free_bytes() / need)))


def on_devices(jobs: Sequence[Job], devices: int) -> list[Job]:
    """The jobs with the memory that they need on each of so many devices that share a cell."""
    return [
        replace(job, memory=job.memory and job.memory * share(job.experiment, devices))
        for job in jobs
    ]


def workers_by_device(num_cells: int, machine: Machine) -> int:
    """One worker per visible GPU, or one single-threaded worker per core; fewer if each trains on
    several."""
    most = resources.cores()
    if _on_gpu(machine.device):
        most = len(resources.gpus()) if machine.device in ("auto", "cuda") else 1
    return max(1, min(num_cells, most // machine.devices))


def _on_gpu(device: str) -> bool:
    """Whether workers on this device (`auto`, `cpu`, `cuda`, `cuda:1` ...) use a GPU."""
    return resources.has_gpu() if device == "auto" else device != "cpu"


def largest(recipe: Recipe, types: Types, machine: Machine) -> tuple[float, str]:
    """Bytes of the cell that needs most memory, on each of its devices, and its name. A model of
    unknown size counts as small; the models and data should be on this machine."""
    small = SMALL, recipe.cells[0].slug
    if all(cell.model.name == "sandbox" for cell in recipe.cells):
        return small  # without counting, which imports torch
    from backfire.commands.forecast import Forecast

    found = Forecast(recipe, types).largest(machine)
    each = ((n.total * share(cell, machine.devices), cell.slug) for cell, n in found if n)
    return max(each, default=small)
