"""The context of all stages."""

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
    """Cache, machine, progress reports and shared state of the stages of a run."""

    store: Store
    machine: Machine = field(default_factory=Machine)
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of rows too long to be evaluated, by subset."""
    _loaded: tuple[str, PreTrainedModel] | None = None
