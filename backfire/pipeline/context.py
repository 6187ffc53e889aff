"""What every stage may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backfire.experiment import Machine
from backfire.model.resident import Resident
from backfire.progress import Progress, silent
from backfire.store import Store

if TYPE_CHECKING:
    import torch


@dataclass
class Context:
    """What every stage may use: the cache, the machine, the progress display."""

    store: Store
    machine: Machine = field(default_factory=Machine)
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that were too long to be measured, by subset."""
    resident: Resident = field(default_factory=Resident)
    """The base model in memory; a worker hands it from job to job."""

    @property
    def device(self) -> torch.device:
        from backfire.model.load import device_of

        return device_of(self.machine.device)
