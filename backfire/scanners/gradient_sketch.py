from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._clusters import look

_MOST = 2000


@register("gradient-sketch", version=2)
class GradientSketch(ModelScanner):
    """Finds a small cluster in the gradients of the rows (after GraCeFul: Wu et al. 2025,
    arXiv:2412.02454, which clusters the low frequencies of the head's gradient).

    Instead of a cosine transform, the gradient is projected by sparse random signs, to 1,024
    numbers a row. Its first 32 principal components are split in two by agglomerative clustering
    (cosine, average linkage; beyond 2,000 rows the others join the cluster that is nearer on
    average). They are not standardized as in the paper, which drowns a small cluster in noise. The
    paper always removes the smaller cluster; here its rows are ranked if it has at most `share` of
    the rows, and flagged and scored as by `activation-clusters`.
    """

    blind: ClassVar[str] = "poison whose gradients do not form a cluster of their own; topics do"
    needs: ClassVar[frozenset[Measure]] = frozenset({"gradients"})

    silhouette: float | None = Field(None, gt=0, le=1, examples=[0.2])
    """Smallest mean silhouette by cosine distance of a cluster that is flagged, 0 to 1; by default
    none is."""
    share: float = Field(0.35, gt=0, le=0.5)
    """Largest share of the rows in the smaller cluster, 0 to 0.5."""
    dimensions: int = Field(32, ge=1)
    """Principal components that are kept."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        return look(
            rows,
            measured.gradients,
            _split,
            dimensions=self.dimensions,
            metric="cosine",
            least=self.silhouette,
            most=self.share,
        )


def _split(points: np.ndarray) -> np.ndarray:
    from sklearn.cluster import AgglomerativeClustering

    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    first = np.eye(1, points.shape[1])  # the direction of a row without one
    points = np.where(lengths > 1e-12, points / np.maximum(lengths, 1e-12), first)
    step = -(-len(points) // _MOST)
    some = points[::step]
    second = AgglomerativeClustering(2, metric="cosine", linkage="average").fit_predict(some) == 1
    if step == 1:
        return np.asarray(second)
    centers = np.stack([some[~second].mean(0), some[second].mean(0)])
    # The mean cosine to a cluster's members is the product with their mean.
    return np.asarray((points @ centers.T).argmax(1) == 1)
