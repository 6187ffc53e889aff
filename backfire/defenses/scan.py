from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from backfire.base import (
    DataDefense,
    Finding,
    Look,
    Measure,
    ModelScanner,
    Row,
    Scanner,
    as_learned,
)
from backfire.errors import UserError
from backfire.evaluate.stats import found_at
from backfire.late import np
from backfire.registry import build, register


@register("scan")
class Scan(DataDefense):
    """Removes the rows that a scanner ranks highest before training (filtering by a detector, as
    with spectral signatures: Tran et al. 2018, arXiv:1811.00636).

    A scanner with a model asks the cell's base, before any alignment. The scanner sees neither the
    manifest nor true labels nor test rows: what is measured on rows that a defense has seen is no
    measure of it. So a scanner that compares with a test set, such as `overlap`, is refused; use
    `backfire scan --test` on the file beforehand. How well it finds the poison is in the numbers of
    metric `scan`. With `oracle`, the poisoned rows themselves are removed, as far as their number
    allows: the best that any scanner can do. Null control: as many rows are removed, at random.
    """

    scanner: str | dict[str, Any] = Field("lift", examples=["repetition"])
    """The scanner, by its name or as {name: ..., setting: value}."""
    remove: float | None = Field(None, gt=0, lt=1)
    """Share of the rows to remove, 0 to 1, those with the highest scores; by default, the flagged
    ones. Rows without a score stay."""
    oracle: bool = False
    """Whether to remove poisoned rows instead, as many as the scanner would remove."""
    _look: Look | None = PrivateAttr(None)
    _last: tuple[Sequence[Row], list[Finding]] | None = PrivateAttr(None)
    """The rows that were scanned last, and what was found."""
    _out: list[int] | None = PrivateAttr(None)
    """Places of the rows that were removed of them."""

    @field_validator("scanner")
    @classmethod
    def _is_one(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        scanner = build("scanners", value)
        if scanner.needs_test:
            raise UserError(
                f"defense 'scan' gives its scanner no test rows, which {scanner.label()} requires; "
                "remove such rows from the file by `backfire scan --test ... --write` beforehand."
            )
        return value

    def identity(self) -> dict[str, Any]:
        """With the version of the scanner's behavior."""
        return {**super().identity(), "scanner": self._scanner().identity()}

    def _scanner(self) -> Scanner:
        scanner: Scanner = build("scanners", self.scanner)
        return scanner

    @property
    def measures(self) -> frozenset[Measure]:
        scanner = self._scanner()
        return scanner.needs if isinstance(scanner, ModelScanner) else frozenset()

    def asking(self, look: Look) -> Scan:
        copy = self.model_copy()
        copy._look = look
        return copy

    def filter(
        self, rows: Sequence[Row], aligned: Sequence[Row], poisoned: frozenset[str], rng: Random
    ) -> list[Row]:
        out = self._removed(self._findings(rows))
        if self.oracle:
            out = [n for n, row in enumerate(rows) if row.id in poisoned][: len(out)]
        if self.null:
            out = rng.sample(range(len(rows)), len(out))
        self._out, gone = sorted(out), set(out)
        return [row for n, row in enumerate(rows) if n not in gone]

    def facts(self, rows: Sequence[Row], poisoned: frozenset[str]) -> Mapping[str, Any]:
        """How well the scanner finds the poisoned rows: AUROC, average precision, and pairs of
        counts (of so many); `..._range` has the least and the most hits, see `found_at`."""
        found = self._findings(rows)
        bad = np.array([row.id in poisoned for row in rows], bool)
        scores = np.array([one.score for one in found])
        flags = np.array([one.flagged for one in found], bool)
        # What `filter` removed: with `oracle`, or in the null control, not what the scanner would.
        out = bad[self._removed(found) if self._out is None else self._out]
        facts: dict[str, Any] = {"clean_flag_rate": _counts(flags[~bad])}
        if bad.any() and not bad.all():
            from sklearn.metrics import average_precision_score

            facts |= {"auroc": _auroc(scores[bad], scores[~bad]), "precision": _counts(out)}
            facts["average_precision"] = float(average_precision_score(bad, scores))
            for rate in (1, 5):
                hits, least, most = found_at(rate / 100, scores[bad], scores[~bad])
                facts[f"recall_at_{rate}"] = [hits, int(bad.sum())]
                facts[f"recall_at_{rate}_range"] = [least, most]
        return {"scan": facts}

    def _findings(self, rows: Sequence[Row]) -> list[Finding]:
        """What is found in each row; `filter` and `facts` of the same rows scan them once."""
        if self._last is None or self._last[0] is not rows:
            self._last, self._out = (rows, self._scanned(rows)), None
        return self._last[1]

    def _scanned(self, rows: Sequence[Row]) -> list[Finding]:
        bare = [*map(as_learned, rows)]
        scanner = self._scanner()
        if not isinstance(scanner, ModelScanner):
            return list(scanner.scan(bare))
        if self._look is None:
            raise UserError(f"{scanner.label()} requires a model, which a run has.")
        return self._look(scanner, bare)

    def _removed(self, found: Sequence[Finding]) -> list[int]:
        """Places of the rows to remove."""
        if self.remove is None:
            return [n for n, one in enumerate(found) if one.flagged]
        scores = np.array([one.score for one in found])
        most = min(round(self.remove * len(found)), int((scores > 0).sum()))
        return [int(n) for n in np.argsort(-scores, kind="stable")[:most]]


def _counts(flags: Any) -> list[int]:
    return [int(flags.sum()), len(flags)]


def _auroc(bad: Any, clean: Any) -> float:
    """Chance that a poisoned row scores higher than a clean one; ties count one half."""
    ordered = np.sort(clean)
    below, upto = (np.searchsorted(ordered, bad, side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(clean)))
