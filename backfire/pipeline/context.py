"""What every stage may use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from backfire.experiment import Machine
from backfire.model.resident import Resident
from backfire.progress import Progress, silent
from backfire.store import Stage, Store

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
    beside: Resident = field(default_factory=Resident)
    """The model that a guard compares with, while a cell is measured."""
    merged: dict[Stage, Path] = field(default_factory=dict)
    """Merged models that are on disk only while they are measured."""
    _held: ExitStack = field(default_factory=ExitStack)

    def hold(self, stage: Stage, make: Callable[[Path], None]) -> Path:
        """The folder of a merged model that is not worth keeping; see `drop_merged`."""
        if stage not in self.merged:
            folder = self._held.enter_context(self.store.temporary(stage))
            make(folder)
            self.merged[stage] = folder
        return self.merged[stage]

    def drop_merged(self) -> None:
        """Remove the merged models that `hold` has made."""
        if self.merged:
            self.resident.release()
        self.merged.clear()
        self._held.close()

    @property
    def device(self) -> torch.device:
        from backfire.model.load import device_of

        return device_of(self.machine.device)
