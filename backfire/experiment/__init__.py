"""The settings of one cell.

`Experiment` holds everything that changes a number and is hashed (see `backfire.stages`); `Machine`
holds workers, device and folders, and is not.
"""

from backfire.experiment.experiment import DEFAULT_METRICS, Experiment
from backfire.experiment.settings import (
    JOINED_TOKENS,
    Align,
    Evaluation,
    Machine,
    Safety,
    Train,
)
from backfire.model.settings import Model

__all__ = [
    "DEFAULT_METRICS",
    "JOINED_TOKENS",
    "Align",
    "Evaluation",
    "Experiment",
    "Machine",
    "Model",
    "Safety",
    "Train",
]
