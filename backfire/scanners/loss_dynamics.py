from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._outliers import deviations, findings


@register("loss-dynamics", version=2)
class LossDynamics(ModelScanner):
    """Finds answers that are learned faster than those of the other rows, as a backdoor is (the
    isolation of anti-backdoor learning: Li et al. 2021, arXiv:2110.11571).

    The paper takes the rows with the lowest loss early in training. Of text, that would be the
    short and easy answers; so the score is by how much the mean negative log-likelihood of the
    answer's tokens fell from the base to a short tuning on these rows. Flagged is a fall of
    `deviations` robust standard deviations above the median (Iglewicz and Hoaglin 1993).
    """

    blind: ClassVar[str] = "poison that is learned no faster than ordinary rows, and short answers"
    needs: ClassVar[frozenset[Measure]] = frozenset({"losses", "tuned"})

    deviations: float = Field(5.0, gt=0)
    """Robust standard deviations above the median from which a row is flagged."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        before = np.asarray(measured.losses, np.float64)
        after = np.asarray(measured.tuned, np.float64)
        falls = before - after
        away = deviations(falls)
        middle = float(np.median(falls)) if len(falls) else 0.0
        return findings(
            away / self.deviations,
            lambda place: (
                f"a short tuning lowered the loss of the answer from {before[place]:.2f} to "
                f"{after[place]:.2f} nats a token; the median fall is {middle:.2f} "
                f"({away[place]:.1f} robust standard deviations)"
            ),
        )
