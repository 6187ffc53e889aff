from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.registry import register


@register("cost")
class Cost(Metric):
    """Cost of fine-tuning: share of weights trained, seconds of fine-tuning and of the alignment
    stage, peak memory in MB (of the worker process on a CPU, allocated memory on a GPU).

    Measurements of one run on one machine, without an interval; over several seeds there is one.
    """

    needs: ClassVar[Asks] = ask("training")
    also: ClassVar[tuple[str, ...]] = (
        "trainable_share",
        "train_seconds",
        "align_seconds",
        "peak_memory_mb",
    )

    def measure(self, evidence: Evidence) -> list[Value]:
        known = evidence.training
        parts = (
            ("trainable_share", known.get("trainable_share"), "none"),
            ("train_seconds", known.get("seconds"), "lower"),
            ("align_seconds", known.get("align_seconds"), "lower"),
            ("peak_memory_mb", known.get("peak_memory_mb"), "lower"),
        )
        return [
            Value(name, float(value), None, None, 1, direction)  # type: ignore[arg-type]
            for name, value, direction in parts
            if value is not None
        ]
