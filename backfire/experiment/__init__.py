"""One cell of the matrix: `Experiment` is everything that changes a number, and nothing else.

`Experiment` is hashed (see `backfire.stages`); `Machine` (workers, device, folders) never is.
"""

from backfire.experiment.experiment import DEFAULT_METRICS, Experiment
from backfire.experiment.settings import Align, Evaluation, Machine, Safety, Train
from backfire.model.settings import Model

__all__ = [
    "DEFAULT_METRICS",
    "Align",
    "Evaluation",
    "Experiment",
    "Machine",
    "Model",
    "Safety",
    "Train",
]
