"""What every stage may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backfire.experiment import Machine
from backfire.progress import Progress, silent
from backfire.store import Store

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass
class Context:
    """What every stage may use: the cache, the machine, the progress display."""

    store: Store
    machine: Machine = field(default_factory=Machine)
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that were too long to be measured, by subset."""
    _model: tuple[str, PreTrainedModel] | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        from backfire.model.load import device_of

        return device_of(self.machine.device)

    def model(self, key: str, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model of this key, loaded if it is not the last one."""
        if self._model is None or self._model[0] != key:
            self.release_model()
            self._model = key, load()
        return self._model[1]

    def release_model(self) -> None:
        """Release the memory of the last model."""
        self._model = None
