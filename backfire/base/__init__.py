"""Base classes of all components, and the types they exchange.

A component is its config: a frozen model whose fields are the knobs, with one method that is the
behavior. What exists only at run time (model, tokenizer, generator) is an argument of that method.
"""

from typing import TYPE_CHECKING

from backfire.base.attacks import Attack as Attack
from backfire.base.attacks import Backdoor as Backdoor
from backfire.base.attacks import Corruption as Corruption
from backfire.base.attacks import Insertion as Insertion
from backfire.base.attacks import Mixture as Mixture
from backfire.base.attacks import Poison as Poison
from backfire.base.attacks import Secret as Secret
from backfire.base.attacks import Trigger as Trigger
from backfire.base.config import Component as Component
from backfire.base.config import Config as Config
from backfire.base.config import Preset as Preset
from backfire.base.config import local_files as local_files
from backfire.base.defenses import AlignDefense as AlignDefense
from backfire.base.defenses import DataDefense as DataDefense
from backfire.base.defenses import Defense as Defense
from backfire.base.defenses import RepairDefense as RepairDefense
from backfire.base.defenses import TrainDefense as TrainDefense
from backfire.base.defenses import TrainHook as TrainHook
from backfire.base.evidence import Ask as Ask
from backfire.base.evidence import Asks as Asks
from backfire.base.evidence import Evidence as Evidence
from backfire.base.evidence import Form as Form
from backfire.base.evidence import Metric as Metric
from backfire.base.evidence import Need as Need
from backfire.base.evidence import Part as Part
from backfire.base.evidence import Probe as Probe
from backfire.base.evidence import Sample as Sample
from backfire.base.evidence import SetName as SetName
from backfire.base.evidence import Subset as Subset
from backfire.base.evidence import Value as Value
from backfire.base.evidence import ask as ask
from backfire.base.evidence import needs_of as needs_of
from backfire.base.judges import Exchange as Exchange
from backfire.base.judges import Judge as Judge
from backfire.base.judges import Verdict as Verdict
from backfire.base.methods import LARGE as LARGE
from backfire.base.methods import Method as Method
from backfire.base.rows import Dataset as Dataset
from backfire.base.rows import Message as Message
from backfire.base.rows import Place as Place
from backfire.base.rows import Rendered as Rendered
from backfire.base.rows import Row as Row
from backfire.base.rows import Segments as Segments
from backfire.base.rows import Template as Template
from backfire.base.rows import select as select
from backfire.base.secrets import Leak as Leak
from backfire.base.secrets import SecretProbe as SecretProbe

if TYPE_CHECKING:
    from backfire.base.defenses import Inner as Inner
