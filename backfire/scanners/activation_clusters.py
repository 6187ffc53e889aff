from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._clusters import look


@register("activation-clusters", version=2)
class ActivationClusters(ModelScanner):
    """Finds a small cluster in the hidden states of the rows with one label, or of all (activation
    clustering: Chen et al. 2018, arXiv:1811.03728).

    The first ten principal components are split in two by k-means. The smaller cluster counts if it
    has at most `share` of the rows (0.35 in the paper's code).

    Its rows are ranked, but none is flagged unless `silhouette` is given: topics of clean files
    form clusters as separate as those of poison. The score is the silhouette over `silhouette`, or
    over that of five clouds with the same covariance and no clusters, if that is larger; without a
    threshold x / (1 + x), for a silhouette of x in units of 0.25.
    """

    blind: ClassVar[str] = "poison that does not form a cluster of its own; topics do"
    needs: ClassVar[frozenset[Measure]] = frozenset({"states"})

    silhouette: float | None = Field(None, gt=0, le=1, examples=[0.3])
    """Smallest mean silhouette of a cluster that is flagged, 0 to 1 (0.1 in the toolbox ART); by
    default none is."""
    share: float = Field(0.35, gt=0, le=0.5)
    """Largest share of the rows in the smaller cluster, 0 to 0.5."""
    dimensions: int = Field(10, ge=1)
    """Principal components that are kept."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        return look(
            rows,
            measured.states,
            _split,
            dimensions=self.dimensions,
            metric="euclidean",
            least=self.silhouette,
            most=self.share,
        )


def _split(points: np.ndarray) -> np.ndarray:
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(2, n_init=10, random_state=0).fit_predict(points) == 1)
