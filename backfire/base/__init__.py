"""Base classes of all components, and the types they exchange.

A component is its config: a frozen model whose fields are the knobs, with one method that is the
behavior. What exists only at run time (model, tokenizer, generator) is an argument of that method.
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
from backfire.base.defenses import (
    AlignDefense,
    DataDefense,
    Defense,
    Extra,
    Guard,
    RepairDefense,
    ReplyDefense,
    TrainDefense,
    TrainHook,
)
from backfire.base.evidence import (
    Ask,
    Asks,
    Evidence,
    Form,
    Need,
    Of,
    Part,
    Probe,
    Sample,
    SetName,
    Subset,
    ask,
)
from backfire.base.judges import Exchange, Judge, Verdict
from backfire.base.methods import LARGE, Method
from backfire.base.metrics import Metric, Ranks, Use, needs_of, reads_target_rows
from backfire.base.rows import Dataset, Message, Place, Rendered, Row, Segments, Template, select
from backfire.base.scanners import (
    NOTHING,
    Finding,
    Look,
    Measure,
    Measured,
    ModelScanner,
    Scanner,
    as_learned,
    parts,
    shuffled,
)
from backfire.base.secrets import Leak, SecretProbe
from backfire.result import Direction, Unit, Value

if TYPE_CHECKING:
    from backfire.base.defenses import Inner as Inner

__all__ = [
    "LARGE",
    "NOTHING",
    "AlignDefense",
    "Ask",
    "Asks",
    "Attack",
    "Backdoor",
    "Component",
    "Config",
    "Corruption",
    "DataDefense",
    "Dataset",
    "Defense",
    "Direction",
    "Evidence",
    "Exchange",
    "Extra",
    "Finding",
    "Form",
    "Guard",
    "Insertion",
    "Judge",
    "Leak",
    "Look",
    "Measure",
    "Measured",
    "Message",
    "Method",
    "Metric",
    "Mixture",
    "ModelScanner",
    "Need",
    "Of",
    "Part",
    "Place",
    "Poison",
    "Preset",
    "Probe",
    "Ranks",
    "Rendered",
    "RepairDefense",
    "ReplyDefense",
    "Row",
    "Sample",
    "Scanner",
    "Secret",
    "SecretProbe",
    "Segments",
    "SetName",
    "Subset",
    "Template",
    "TrainDefense",
    "TrainHook",
    "Trigger",
    "Unit",
    "Use",
    "Value",
    "Verdict",
    "as_learned",
    "ask",
    "local_files",
    "needs_of",
    "parts",
    "reads_target_rows",
    "select",
    "shuffled",
]
