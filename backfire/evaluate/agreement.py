"""Agreement of two judges on the same exchanges (Cohen's kappa)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backfire.base import Verdict
from backfire.evaluate.stats import Floats, bootstrap

CATEGORIES = ("negative", "positive", "undecided")
"""Categories of a verdict, in the order of the confusion matrix."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Chance-corrected agreement of two judges on the same exchanges."""

    kappa: float | None
    """Cohen's kappa (1960); None if both judges always give the same single category."""
    low: float | None
    high: float | None
    n: int
    share: float
    """Share of the exchanges on which they agree."""
    confusion: tuple[tuple[int, ...], ...]
    """Exchanges by the first judge's category (rows) and the second's; see `CATEGORIES`."""


def agreement(
    a: Sequence[Verdict], b: Sequence[Verdict], requests: Sequence[str] | None = None
) -> Agreement:
    """Cohen's kappa with a 95 % bootstrap interval over the exchanges.

    With `requests` (the request id of each exchange) the bootstrap draws requests: the replies of
    several models to one request stay together. Undecided verdicts are a separate category, so that
    no exchange is left out.
    """
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    first, second = (np.array([_category(verdict) for verdict in side]) for side in (a, b))
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} verdicts cannot be paired")
    n, size = len(first), len(CATEGORIES)
    labels = list(range(size))
    table = confusion_matrix(first, second, labels=labels)
    confusion = tuple(tuple(int(count) for count in row) for row in table)
    share = float((first == second).mean())
    if len({*first.tolist(), *second.tolist()}) == 1:
        return Agreement(None, None, None, n, share, confusion)
    kappa = float(cohen_kappa_score(first, second, labels=labels))
    cells = np.eye(size * size)[first * size + second]  # [exchanges, pairs of categories]
    if requests is not None:
        _, request_index = np.unique(np.array(requests), return_inverse=True)
        together = np.zeros((request_index.max() + 1, cells.shape[1]))
        np.add.at(together, request_index, cells)
        cells = together
    [(low, high)] = bootstrap(len(cells), lambda counts: _kappas(counts @ cells, size))
    return Agreement(kappa, low, high, n, share, confusion)


def _category(verdict: Verdict) -> int:
    return 2 if verdict.positive is None else int(verdict.positive)


def _kappas(tables: Floats, size: int) -> Floats:
    """Kappa of each confusion matrix, [resamples, 1]; nan where chance agreement is 1."""
    shares = tables.reshape(-1, size, size) / tables.sum(axis=1)[:, None, None]
    observed = np.einsum("rii->r", shares)
    expected = np.einsum("ri,ri->r", shares.sum(axis=2), shares.sum(axis=1))
    rest = 1 - expected
    kappas: Floats = np.divide(
        observed - expected, rest, out=np.full(len(rest), np.nan), where=rest > 1e-12
    )
    return kappas[:, None]
