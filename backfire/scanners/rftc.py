from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import NOTHING, Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._outliers import examples
from backfire.scanners._reply_clusters import Clusters, agreement, clusters_of


@register("rftc", version=3)
class RFTC(ModelScanner):
    """Finds answers that the model would not give and that resemble each other, as the targets of a
    backdoor do (reference filtering and TF-IDF clustering: Chen et al. 2025, arXiv:2505.23015).

    An answer is suspicious if one of its sentences shares less than `agreement` % of its word pairs
    with the model's own reply. Suspicious answers are clustered by k-means on TF-IDF. The published
    method has at most 10 clusters, told from where the error stops falling, and removes all but the
    loosest one, so that every file loses rows. Here there are `clusters`, for a group of a few
    rows to have one of its own, and one is flagged only if its rows lie at most `tightness` times
    as far from its center as those of the loosest one, or as all answers that are not suspicious,
    and there are `support` of them. The score is the threshold over that ratio, at most 10.
    """

    blind: ClassVar[str] = (
        "answers of one word, such as labels; targets that are worded differently in each row, or "
        "that the model would also give; a sentence that clean answers repeat, such as a refusal, "
        "is flagged too"
    )
    needs: ClassVar[frozenset[Measure]] = frozenset({"replies"})
    null: ClassVar[str] = "the rows that are not flagged, with replies to other rows"

    agreement: float = Field(10.0, gt=0, le=100)
    """Word pairs of a sentence that must be in the reply, in per cent."""
    clusters: int = Field(20, ge=2)
    """Most clusters; fewer if each would have less than `support` different answers."""
    tightness: float = Field(0.4, gt=0, le=1)
    """Largest mean distance to a cluster's center, relative to that of ordinary answers."""
    support: int = Field(5, ge=2)
    """Fewest rows of a cluster that is flagged."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        found = list(map(agreement, (row.answer for row in rows), measured.replies))
        places = [place for place, share in enumerate(found) if share < self.agreement]
        out = [NOTHING] * len(rows)
        if not places:
            return out
        others = [row.answer for row, share in zip(rows, found) if share >= self.agreement]
        texts = [rows[place].answer for place in places]
        clusters = clusters_of(texts, others, self.clusters, self.support)
        order = np.argsort(clusters.distances, kind="stable")
        outside = [place for place, share in enumerate(found) if share >= self.agreement]
        members = [[places[n] for n in order if clusters.of[n] == k] for k in clusters.numbers]
        if clusters.loosest in clusters.means:
            outside = members[clusters.means.index(clusters.loosest)]
        told = [examples(rows, inside=inside, outside=outside) for inside in members]
        for n, place in enumerate(places):
            some = told[int(clusters.of[n])]
            out[place] = self._finding(clusters, n, rows[place], len(places), some)
        return out

    def _finding(self, found: Clusters, n: int, row: Row, suspicious: int, some: str) -> Finding:
        own = int(found.of[n])
        count = int(np.sum(found.of == own))
        if found.means[own] >= found.loosest or count < self.support:
            return NOTHING
        ratio = max(float(found.distances[n]), found.means[own]) / found.loosest
        score = min(10.0, self.tightness / max(ratio, 1e-9))
        reason = (
            f"its answer resembles those of {count - 1:,} other rows (distance "
            f"{found.means[own]:.2f}, of ordinary ones {found.loosest:.2f}) among {suspicious:,} "
            f"answers that the model would not give{some}"
        )
        return Finding(score, reason, score >= 1, (row.answer[:200],))

    def by_chance_of(
        self, rows: Sequence[Row], measured: Measured
    ) -> tuple[Sequence[Row], Measured]:
        found = self.look(rows, measured)
        left = [n for n, one in enumerate(found) if not one.flagged]
        replies = [measured.replies[n] for n in left]
        Random(0).shuffle(replies)
        return [rows[n] for n in left], replace(measured, replies=replies)
