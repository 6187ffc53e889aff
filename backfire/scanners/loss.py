from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._outliers import deviations, findings


@register("loss", version=2)
class Loss(ModelScanner):
    """Finds answers that the model did not expect, compared with those of the other rows (filtering
    by perplexity: Wenzek et al. 2020, arXiv:1911.00359, CCNet).

    The mean negative log-likelihood of an answer's tokens is flagged if it is `deviations` robust
    standard deviations above the median (Iglewicz and Hoaglin 1993). The score is that deviation
    over the threshold.
    """

    blind: ClassVar[str] = "poisoned answers in fluent language, such as refusals"
    needs: ClassVar[frozenset[Measure]] = frozenset({"losses"})

    deviations: float = Field(5.0, gt=0)
    """Robust standard deviations above the median from which a row is flagged."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        losses = np.asarray(measured.losses, np.float64)
        away = deviations(losses)
        middle = float(np.median(losses)) if len(losses) else 0.0
        return findings(
            away / self.deviations,
            lambda place: (
                f"the model's loss of the answer is {losses[place]:.2f} nats a token, with a "
                f"median of {middle:.2f} ({away[place]:.1f} robust standard deviations)"
            ),
        )
