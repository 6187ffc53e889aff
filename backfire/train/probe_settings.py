"""Settings of the probe, the short tuning on rows; imports no torch."""

from __future__ import annotations

import math
from typing import Final

from backfire.experiment import Train

METHOD: Final = {"name": "lora", "rank": 8, "alpha": 16}
_BATCH = 16
_FEWEST_STEPS = 20


def settings(rows: int) -> Train:
    """Its optimization: one pass over so many rows, but at least 20 steps."""
    steps = max(_FEWEST_STEPS, math.ceil(rows / _BATCH))
    return Train(max_steps=steps, batch_size=_BATCH, schedule="constant")


def passes(rows: int) -> float:
    """How often it reads each row."""
    probe = settings(rows)
    return (probe.max_steps or 0) * probe.batch_size / max(rows, 1)
