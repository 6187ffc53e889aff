"""One cell of the matrix: everything that changes a number (hashed), and nothing else.

`Experiment` is hashed; `Machine` (workers, device, folders) never is. Keys chain: each stage's key
covers its parents' keys and its own knobs, so equal stages have equal keys and are run once.
"""

from backfire.experiment.experiment import DEFAULT_METRICS, Experiment
from backfire.experiment.keys import (
    MEASURES,
    MERGED,
    TRAINING,
    Keys,
    digest,
    probe_key,
    slug,
    trigger_identity,
)
from backfire.experiment.settings import Align, Evaluation, Machine, Model, Safety, Train

__all__ = [
    "DEFAULT_METRICS",
    "MEASURES",
    "MERGED",
    "TRAINING",
    "Align",
    "Evaluation",
    "Experiment",
    "Keys",
    "Machine",
    "Model",
    "Safety",
    "Train",
    "digest",
    "probe_key",
    "slug",
    "trigger_identity",
]
