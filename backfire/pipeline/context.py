"""What every stage may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backfire.experiment import Machine
from backfire.progress import Progress, silent
from backfire.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Context:
    """What every stage may use: the cache, the machine, a way to say how far it is."""

    store: Store
    machine: Machine = field(default_factory=Machine)
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that were too long to be measured, by subset."""
    _loaded: tuple[str, PreTrainedModel] | None = None
