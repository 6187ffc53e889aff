"""The nouns, and the one verb of each.

A component is its config: a frozen model whose fields are the knobs, with one method that is the
behavior. What exists only at run time (model, tokenizer, generator) is an argument of the verb.
"""

from typing import TYPE_CHECKING

from backfire.base.attacks import (
    Attack,
    Backdoor,
    Corruption,
    Insertion,
    Mixture,
    Poison,
    Secret,
    Trigger,
)
from backfire.base.config import Component, Config, Preset, local_files
from backfire.base.evidence import Evidence, Form, Metric, Need, Part, Probe, Sample, Value
from backfire.base.judging import Exchange, Judge, Verdict
from backfire.base.memory import Leak, Recall
from backfire.base.rows import Dataset, Message, Place, Row, Segments, Template, select
from backfire.base.training import (
    LARGE,
    AlignDefense,
    DataDefense,
    Defense,
    Guard,
    Method,
    RepairDefense,
    TrainDefense,
)

if TYPE_CHECKING:
    from backfire.base.training import Inner as Inner

__all__ = [
    "LARGE",
    "AlignDefense",
    "Attack",
    "Backdoor",
    "Component",
    "Config",
    "Corruption",
    "DataDefense",
    "Dataset",
    "Defense",
    "Evidence",
    "Exchange",
    "Form",
    "Guard",
    "Insertion",
    "Judge",
    "Leak",
    "Message",
    "Method",
    "Metric",
    "Mixture",
    "Need",
    "Part",
    "Place",
    "Poison",
    "Preset",
    "Probe",
    "Recall",
    "RepairDefense",
    "Row",
    "Sample",
    "Secret",
    "Segments",
    "Template",
    "TrainDefense",
    "Trigger",
    "Value",
    "Verdict",
    "local_files",
    "select",
]
