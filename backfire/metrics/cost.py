from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.registry import register


@register("cost")
class Cost(Metric):
    """What the tuning took: share of the weights that moved, seconds of training and of the
    alignment before it, peak memory in MB (of the worker's process on CPU, allocated on a GPU).

    Plain measurements of one run on one machine, so without an interval; over seeds they get one.
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
