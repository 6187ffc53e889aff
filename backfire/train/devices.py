"""Checks of a training run on several devices before it begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from backfire.base import TrainDefense
from backfire.errors import UserError

if TYPE_CHECKING:
    from backfire.experiment import Experiment, Machine

OUT_OF_MEMORY = (
    "Out of memory on one of several devices that share the weights; shorten train.max_length, or "
    "run with --recompute or on more devices."
)
"""Message of the error after which all ranks start again, with fewer rows per pass."""
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int] | None:
    """Rank of this process, and number of ranks, if torchrun or a program like it started several;
    else None. A stray WORLD_SIZE means nothing."""
    values = [os.environ.get(name, "") for name in _RENDEZVOUS]
    if not all(values) or not (values[0].isdigit() and values[1].isdigit()):
        return None
    rank, size = int(values[0]), int(values[1])
    return (rank, size) if size > 1 else None


def check(machine: Machine) -> None:
    """Check that the devices exist.

    Raises:
        UserError: there are fewer, or the settings contradict each other.
    """
    outside = launched()
    if outside and outside[1] != machine.devices:
        raise UserError(
            f"--devices {machine.devices}, but {outside[1]} ranks were started (WORLD_SIZE); leave "
            "--devices out."
        )
    if outside and machine.workers > 1:
        raise UserError(
            f"--workers {machine.workers}: ranks that torchrun started train one cell at a time; "
            "leave --workers out."
        )
    if machine.devices == 1:
        # accelerate gives an address where it is told of several processes.
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
            raise UserError(
                "accelerate launch --cpu starts one process, whatever --num_processes says; use "
                "torchrun, or leave accelerate out and give --devices."
            )
        return
    import torch

    from backfire.model.load import device_of

    device = device_of(machine.device)
    if device.type != "cuda":
        return
    if device.index is not None:
        raise UserError(
            f"--device {machine.device} is one device; with --devices {machine.devices} use cuda."
        )
    if not outside and machine.devices > (found := torch.cuda.device_count()):
        raise UserError(
            f"--devices {machine.devices}: this machine has {found} GPU{'s' * (found != 1)}."
        )


def share(experiment: Experiment, devices: int) -> float:
    """How much of the memory of a cell on one device each of several needs. Sharded weights are
    loaded whole: 4 of the 16 bytes that full tuning takes per weight."""
    sharded = experiment.method.trains and not experiment.method.adapts
    return max(1 / devices, 0.25) if sharded and devices > 1 else 1.0


def check_cells(cells: Iterable[Experiment], machine: Machine) -> None:
    """Check that the training of these cells works on several devices.

    Raises:
        UserError: it does not, in one sentence.
    """
    parts = [part for cell in cells for part in (cell.alignment, cell) if part]
    for part in parts if machine.devices > 1 else ():
        if part.method.adapts or not part.method.trains:
            continue  # every rank has the whole model, and all of this works
        one = f"--devices {machine.devices}: method '{part.method.name}' with"
        if part.method.trained_type() != "float32":
            kind = part.method.trained_type()
            raise UserError(f"{one} dtype {kind} trains on one device; use float32.")
        if part.train.optimizer != "adamw":
            raise UserError(
                f"{one} optimizer {part.train.optimizer} trains on one device; use adamw."
            )
        if part.train.compute == "float16":
            raise UserError(f"{one} compute float16 trains on one device; use float32.")
        for defense in part.acting:
            if isinstance(defense, TrainDefense) and not defense.shards:
                name = f"defense '{defense.name}'"
                raise UserError(f"{one} {name} trains on one device; use method lora.")
