from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

from pydantic import Field

from backfire.base import DataDefense, Preset, Row
from backfire.errors import UserError
from backfire.registry import register


@register("safe-mix")
class SafeMix(DataDefense):
    """Replaces some of the user's benign rows by alignment rows (SafeInstruct, Bianchi et al. 2024,
    arXiv:2309.07875; VLGuard's mixing, Zong et al. 2024, arXiv:2402.02207).

    The number of rows, and of steps, does not change, as in Lisa's VLGuard baseline
    (arXiv:2405.18641); the two papers above add rows instead. Poisoned rows are never replaced, so
    that the harm in the data is the same with and without the defense. Too few benign rows are an
    error (Lisa's code, at its defaults, continues without any). Null control: the same rows are
    replaced by copies of the user's other benign rows.
    """

    needs_alignment: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "lisa-paper": Preset(
            "the VLGuard-mixing baseline of Lisa's paper (of 5,000 rows)", {"rows": 1000}
        ),
    }

    share: float = Field(0.2, ge=0, le=1)
    """Alignment rows as a share of all rows, 0 to 1 (Lisa's paper: 1,000 of 5,000)."""
    rows: int | None = Field(None, ge=0)
    """Number of alignment rows; overrides `share`."""

    def filter(
        self, rows: Sequence[Row], aligned: Sequence[Row], poisoned: frozenset[str], rng: Random
    ) -> list[Row]:
        self.suits(aligned=bool(aligned), harm=True)
        count = round(self.share * len(rows)) if self.rows is None else self.rows
        benign = [place for place, row in enumerate(rows) if row.id not in poisoned]
        for available, kind in ((len(benign), "benign"), (len(aligned), "alignment")):
            if count > available:
                raise UserError(
                    f"{self.label()}: {count} rows are to be mixed in, but there are only "
                    f"{available} {kind} rows; lower rows or share."
                )
        places = rng.sample(benign, count)
        mixed = list(rows)
        if self.null:
            kept = sorted(set(benign) - set(places)) or benign
            new = [
                replace(rows[place], id=f"again {i} {rows[place].id}")
                for i, place in enumerate(rng.choices(kept, k=count))
            ]
        else:
            new = rng.sample(list(aligned), count)
        for place, row in zip(places, new, strict=True):
            mixed[place] = row
        return mixed
