from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._outliers import deviations, findings, strata

_BLOCKS = 4
"""The parts of `Measured.states`: two places of each of two layers."""


@register("spectral")
class Spectral(ModelScanner):
    """Finds rows far out in the direction in which hidden states vary most (spectral signatures:
    Tran et al. 2018, arXiv:1811.00636).

    The states M [row, feature] of the rows with one label, or of all, are centered; v is their top
    right singular vector. The paper removes the rows with the largest (M v)^2, 1.5 times as many as
    it assumes to be poisoned. Here a row is flagged if |M v - median| exceeds `deviations` robust
    standard deviations, so that no row need be. The score is that deviation over the threshold, the
    largest over two layers and two places: poison shows in the answer, not at the prompt's end.
    """

    blind: ClassVar[str] = "poison whose hidden states do not dominate their variance"
    needs: ClassVar[frozenset[Measure]] = frozenset({"states"})

    deviations: float = Field(5.0, gt=0)
    """Robust standard deviations from which a row is flagged."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        away = np.zeros(len(rows))
        sizes = np.zeros(len(rows), int)
        for places in strata(rows):
            if len(places) > 2:
                blocks = np.array_split(measured.states[places], _BLOCKS, axis=1)
                out = [np.abs(deviations(projections(block))) for block in blocks]
                away[places], sizes[places] = np.max(out, axis=0), len(places)
        return findings(
            away / self.deviations,
            lambda place: (
                f"its hidden states lie {away[place]:.1f} robust standard deviations out in the "
                f"direction in which those of {sizes[place]:,} rows vary most"
            ),
        )


def projections(features: np.ndarray) -> np.ndarray:
    """Centered features along their top right singular vector [row]."""
    from sklearn.utils.extmath import randomized_svd

    centered = np.asarray(features, np.float64) - features.mean(0)
    _, _, right = randomized_svd(centered, 1, random_state=0)
    return np.asarray(centered @ right[0])
