"""Which training runs go through one base in the same passes, and how many. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from backfire.base import TrainDefense
from backfire.experiment import JOINED_TOKENS, Machine
from backfire.plan import Job

MOST = 8
"""Most runs at once, unless `--join` says more."""
_LONGER = 2.0
"""Most times as many steps as those of another run of a group: it waits until all end."""


def can_join(job: Job, machine: Machine) -> bool:
    """Whether a job is a training run that can share passes with others on this machine."""
    run = job.experiment
    if job.kind != "train" or machine.join == "off" or machine.packing == "off":
        return False
    if machine.recompute or machine.devices > 1 or not run.method.joins():
        return False
    return all(defense.joins for defense in run.acting if isinstance(defense, TrainDefense))


def alike(one: Job, other: Job) -> bool:
    """Whether two runs that can join start from the same model, compute in the same types, have
    adapters in the same layers, and take about as many steps, where these are known."""
    fewer, more = sorted([one.steps or 0, other.steps or 0])
    return _start(one) == _start(other) and (not fewer or more <= _LONGER * fewer)


def _start(job: Job) -> list[Any]:
    run, align = job.experiment, job.experiment.align
    layers = getattr(run.method, "targets", None)
    return [job.base, job.after, align and [align.method, align.merge], run.train.compute, layers]


def most(job: Job, machine: Machine) -> int:
    """Most runs that are worth training together, if all are like this one."""
    if not can_join(job, machine):
        return 1
    if isinstance(machine.join, int):
        return machine.join
    if job.tokens is None:
        return 1
    return max(1, min(MOST, int(JOINED_TOKENS[_device(machine)] // job.tokens)))


def chosen(
    job: Job, ready: Iterable[Job], machine: Machine, workers: int, memory: float | None = None
) -> list[Job]:
    """The jobs to train together with this one.

    Args:
        ready: other jobs that nobody has, the most urgent first.
        workers: number of workers that may take jobs now, this one included. Each is left as many.
        memory: bytes that this worker has; None is unknown.
    """
    limit = most(job, machine)
    suited = (other for other in ready if can_join(other, machine) and alike(job, other))
    suited = (other for other in suited if _fit([job, other], machine, memory))
    found = list(islice(suited, limit * workers - 1))
    limit, group = min(limit, math.ceil((1 + len(found)) / workers)), [job]
    for other in found:
        if len(group) < limit and _fit([*group, other], machine, memory):
            group.append(other)
    return group[1:]


def _fit(group: Sequence[Job], machine: Machine, memory: float | None) -> bool:
    """Whether the runs together stay within the tokens of a pass and within the memory; with a
    number of runs, whether the last fits into a pass with one of the others."""
    limit = JOINED_TOKENS[_device(machine)]
    if isinstance(machine.join, int):
        *others, last = [job.tokens or 0.0 for job in group]  # an unknown one may fit
        return min(others) + last <= limit
    tokens = sum(job.tokens or math.inf for job in group)
    need = (group[0].memory or 0.0) + sum(job.added or 0.0 for job in group[1:])
    return tokens <= limit and (memory is None or need <= memory)


def _device(machine: Machine) -> str:
    return "cuda" if machine.device.startswith("cuda") else "cpu"
