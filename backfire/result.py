"""What a cell leaves in `result.json`: `CellResult`, and its numbers, each a `Value`.

Nothing here imports pydantic or numpy, so that a run folder is read without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

FORMAT: Final = 2
"""Version of `result.json`. 1 is every file that names none: its values have no unit, family or
role. `results/adapter.py` brings those into the present shape."""

Unit = Literal["share", "score", "nats", "bits", "seconds", "MB", "count", "amount", "number"]
"""`share`: 0 to 1, shown in per cent. `score`: 0 to 1, shown as it is. `amount`: any number that
is not negative, such as a perplexity; `number`: any at all. The rest are named by their titles."""

Role = Literal["headline", "companion", "plain", "floor", "excess", "change", "detail"]
"""What a number is to its metric. These have a column of their own: `headline`, the number that has
the metric's own name (and is the mean of its `outcomes`); `companion`, another number; `plain`, the
headline without what the attack puts around a request. These stand beside the headline that `of`
names: `floor`, the same of the reference model; `excess` and `change`, the difference from it.
`detail` is listed among all numbers only."""

Direction = Literal["higher", "lower", "none"]
"""Which way is better for the person who tunes the model."""

_LIMITS: Final[Mapping[Unit, tuple[float, float]]] = {
    "share": (0.0, 1.0),
    "score": (0.0, 1.0),
    "nats": (-math.inf, math.inf),
    "number": (-math.inf, math.inf),
}


@dataclass(frozen=True)
class Value:
    """One number, never without its interval and its n. `low` and `high` bound a 95 % interval;
    both are None for a plain count."""

    metric: str
    """Its name in tables and files: `attack_success_floor`, or `accuracy[de]` of a part."""
    value: float | None
    low: float | None
    high: float | None
    n: int
    direction: Direction
    unit: Unit = "number"
    role: Role = "headline"
    of: str = ""
    """The name of the headline that a floor, excess or change belongs to."""
    part: str = ""
    """The group, class or dose it is of; empty: all rows."""
    family: str = ""
    """The registered name of the metric that made it."""
    most: float | None = None
    """What it cannot exceed, where its unit does not say so."""

    @property
    def name(self) -> str:
        """`accuracy` of `accuracy[de]`."""
        return self.metric.removesuffix(f"[{self.part}]") if self.part else self.metric

    @property
    def is_change(self) -> bool:
        """Whether it is a difference, which may be negative."""
        return self.role in ("excess", "change")

    @property
    def has_column(self) -> bool:
        """Whether it has a column of its own in tables."""
        return not self.part and self.role in ("headline", "companion", "plain")

    @property
    def limits(self) -> tuple[float, float]:
        """What it can be neither below nor above."""
        if self.is_change:
            return -math.inf, math.inf
        low, high = _LIMITS.get(self.unit, (0.0, math.inf))
        return low, high if self.most is None else self.most


@dataclass(frozen=True)
class Check:
    """A preflight check; `message` is one sentence, with the row where there is one."""

    check: str
    status: Literal["ok", "note", "fail"]
    message: str


@dataclass(frozen=True)
class PoisonCounts:
    """A poison manifest in numbers."""

    nominal_rate: float | None = None
    """The poison rate that the recipe names."""
    rate: float | None = None
    """The share of the rows that are poisoned."""
    poisoned_rows: int | None = None
    rows: int | None = None
    eligible_rows: int | None = None
    spared: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows that cannot be poisoned."""
    labels_before: Mapping[str, int] = field(default_factory=dict)
    triggers: Mapping[str, int] = field(default_factory=dict)
    effective_rate: float | None = None
    """Poisoned rows among the rows that the training steps saw; None where nothing was trained."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CellResult:
    """One cell: which it is, what became of it, and its numbers."""

    slug: str
    """`cell` in files."""
    key: str
    recipe: str = ""
    model: str | None = None
    data: str | None = None
    attack: str | None = None
    rate: float | None = None
    method: str | None = None
    defense: str | None = None
    seed: int | None = None
    template: str | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value of the matrix axes."""
    status: str = "unfinished"
    """`ok`, the exit class of an error, or `unfinished`."""

    error: str = ""
    next: str = ""
    """What to do about the error."""
    traceback: str = ""

    values: tuple[Value, ...] = ()
    warnings: tuple[str, ...] = ()
    cut_share: float | None = None
    """Share of the replies that were cut before their end; None without replies."""
    preflight: tuple[Check, ...] = ()
    poison: PoisonCounts | None = None
    train: Mapping[str, Any] | None = None
    """How the training went; None for an untuned model."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """How the evaluation went: its `seconds`, the `dtype` of the weights, rows `left_out`."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Split -> number of rows."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Stage -> its key."""
    versions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Kind -> component -> its version."""
    plugins: tuple[Mapping[str, Any], ...] = ()
    """The plug-ins whose components were used: `name`, `version`, `sha256`, `components`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved experiment as dotted keys, from `experiment.yaml`."""
    folder: str = ""
    outcomes: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict, repr=False)
    """Cache of `results.pairs.outcomes_by_row`: metric -> row -> hash of the prompt, outcome."""

    @property
    def is_done(self) -> bool:
        """Whether it has numbers."""
        return self.status == "ok"

    def find(self, metric: str) -> Value | None:
        """The value of this name, if it is a number."""
        known = (value for value in self.values if value.metric == metric)
        return next((value for value in known if value.value is not None), None)

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`, or of `error.json` where there are no numbers."""
        ours = [f.name for f in fields(self) if f.name not in ("settings", "folder", "outcomes")]
        apart = _FAILURE if self.is_done else _SUCCESS
        found = {name: getattr(self, name) for name in ours if name not in apart}
        found = {"format": FORMAT, "cell": found.pop("slug"), **found}
        if self.is_done:
            found |= {
                "values": [asdict(value) for value in self.values],
                "preflight": [asdict(check) for check in self.preflight],
                "poison": asdict(self.poison) if self.poison else None,
            }
        return {k: v for k, v in found.items() if v or k not in ("traceback", "plugins")}


_FAILURE: Final = ("error", "next", "traceback")
_SUCCESS: Final = (
    *("values", "warnings", "cut_share", "preflight", "poison", "train", "evaluate", "rows"),
    *("keys", "versions", "plugins"),
)
