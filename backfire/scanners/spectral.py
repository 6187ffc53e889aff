from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._outliers import below_threshold, deviations, examples, findings, strata

_BLOCKS = 4
"""The parts of `Measured.states`: two places of each of two layers."""


_USUAL = 5.0
"""Robust standard deviations that count as one."""


@register("spectral", version=3)
class Spectral(ModelScanner):
    """Finds rows far out in the direction in which hidden states vary most (spectral signatures:
    Tran et al. 2018, arXiv:1811.00636).

    The states M [row, feature] of the rows with one label, or of all, are centered; v is their top
    right singular vector. The paper removes the rows with the largest (M v)^2, 1.5 times as many as
    it assumes to be poisoned. Here a row's deviation is |M v - median| in robust standard
    deviations, the largest over two layers and two places: poison shows in the answer, not at the
    prompt's end.

    Rows are ranked by it, but none is flagged unless `deviations` is given: in clean files topics
    reach 5 to 34, and poison that ranks first 2.5. The score is the deviation over `deviations`,
    or x / (1 + x) for x deviations in units of 5.
    """

    blind: ClassVar[str] = "poison whose hidden states do not dominate their variance"
    needs: ClassVar[frozenset[Measure]] = frozenset({"states"})

    deviations: float | None = Field(None, gt=0, examples=[5.0])
    """Robust standard deviations from which a row is flagged; by default none is."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        away = np.zeros(len(rows))
        groups = [""] * len(rows)
        for places in strata(rows):
            if len(places) > 2:
                blocks = np.array_split(measured.states[places], _BLOCKS, axis=1)
                out = [np.abs(deviations(projections(block))) for block in blocks]
                away[places] = np.max(out, axis=0)
                order = places[np.argsort(-away[places], kind="stable")]
                some = examples(rows, farthest=order, nearest=order[::-1])
                for place in places:
                    groups[place] = f"those of {len(places):,} rows vary most{some}"
        scores = away / self.deviations if self.deviations else below_threshold(away / _USUAL)
        return findings(
            scores,
            lambda place: (
                f"its hidden states lie {away[place]:.1f} robust standard deviations out in the "
                f"direction in which {groups[place]}"
            ),
        )


def projections(features: np.ndarray) -> np.ndarray:
    """Centered features along their top right singular vector [row]."""
    from sklearn.utils.extmath import randomized_svd

    centered = np.asarray(features, np.float64) - features.mean(0)
    _, _, right = randomized_svd(centered, 1, random_state=0)
    return np.asarray(centered @ right[0])
