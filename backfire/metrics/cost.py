from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Unit, Value, ask
from backfire.registry import register


@register("cost")
class Cost(Metric):
    """Cost of fine-tuning: share of weights trained, seconds of fine-tuning and of the alignment
    stage, peak memory in MB (of the worker process on a CPU, allocated memory on a GPU).

    Measurements of one run on one machine, without an interval; over several seeds there is one.
    """

    needs: ClassVar[Asks] = ask("training")

    def measure(self, evidence: Evidence) -> list[Value]:
        parts: tuple[tuple[str, str, Unit], ...] = (
            ("trainable_share", "trainable_share", "share"),
            ("train_seconds", "seconds", "seconds"),
            ("align_seconds", "align_seconds", "seconds"),
            ("peak_memory_mb", "peak_memory_mb", "MB"),
        )
        return [
            Value(name, float(value), None, None, 1, "none" if unit == "share" else "lower", unit)
            for name, key, unit in parts
            if (value := evidence.training.get(key)) is not None
        ]
