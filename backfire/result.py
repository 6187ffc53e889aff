"""The content of `result.json`: `CellResult`, and its numbers, each a `Value`.

This module imports neither pydantic nor numpy, so that run folders are read quickly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

FORMAT: Final = 2
"""Version of `result.json`. Files without one are of version 1, whose values have no unit, family
or role; `results/adapter.py` converts them."""

Unit = Literal["share", "score", "nats", "bits", "seconds", "MB", "count", "amount", "number"]
"""`share`: 0 to 1, shown in per cent. `score`: 0 to 1, shown as it is. `amount`: any number that
is not negative, such as a perplexity; `number`: any at all. The rest are named by their titles."""

Role = Literal["headline", "companion", "plain", "floor", "excess", "change", "detail"]
"""Role of a number within its metric. With a column of their own: `headline`, the number with the
metric's own name (the mean of its `outcomes`); `companion`, another number; `plain`, the headline
on requests without the attack's wording. Shown with the headline that `of` names: `floor`, the same
number of the reference model; `excess` and `change`, the difference from it. `detail` appears only
in the list of all numbers."""

Direction = Literal["higher", "lower", "none"]
"""The better direction for the person who tunes the model."""

_LIMITS: Final[Mapping[Unit, tuple[float, float]]] = {
    "share": (0.0, 1.0),
    "score": (0.0, 1.0),
    "nats": (-math.inf, math.inf),
    "number": (-math.inf, math.inf),
}


@dataclass(frozen=True)
class Value:
    """One number with its 95 % interval [`low`, `high`] and its n; both ends are None if it has
    none, such as a count."""

    metric: str
    """Its name in tables and files: `attack_success_floor`, or `accuracy[de]` for a part."""
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
    """The group of rows, class or number of repeats; empty: all rows."""
    family: str = ""
    """The registered name of its metric."""
    most: float | None = None
    """Its largest possible value, if the unit does not define one."""

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
        """The smallest and the largest possible value."""
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
    """Counts of a poison manifest."""

    nominal_rate: float | None = None
    """The poison rate in the recipe."""
    rate: float | None = None
    """The share of the training rows that is poisoned."""
    poisoned_rows: int | None = None
    rows: int | None = None
    eligible_rows: int | None = None
    spared: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows that cannot be poisoned."""
    labels_before: Mapping[str, int] = field(default_factory=dict)
    triggers: Mapping[str, int] = field(default_factory=dict)
    effective_rate: float | None = None
    """Share of poisoned rows among those seen by the training steps; None without training."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CellResult:
    """One cell: its identity, status and numbers."""

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
    """The next step after the error."""
    traceback: str = ""

    values: tuple[Value, ...] = ()
    warnings: tuple[str, ...] = ()
    cut_share: float | None = None
    """Share of the replies cut at the length limit; None without replies."""
    preflight: tuple[Check, ...] = ()
    poison: PoisonCounts | None = None
    train: Mapping[str, Any] | None = None
    """Summary of the training run; None for an untuned model."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """Summary of the evaluation: `seconds`, `dtype` of the weights, rows `left_out`."""
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
        values = (value for value in self.values if value.metric == metric)
        return next((value for value in values if value.value is not None), None)

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`, or of `error.json` if there are no numbers."""
        ours = [f.name for f in fields(self) if f.name not in ("settings", "folder", "outcomes")]
        excluded = _FAILURE if self.is_done else _SUCCESS
        content = {name: getattr(self, name) for name in ours if name not in excluded}
        content = {"format": FORMAT, "cell": content.pop("slug"), **content}
        if self.is_done:
            content |= {
                "values": [asdict(value) for value in self.values],
                "preflight": [asdict(check) for check in self.preflight],
                "poison": asdict(self.poison) if self.poison else None,
            }
        return {k: v for k, v in content.items() if v or k not in ("traceback", "plugins")}


_FAILURE: Final = ("error", "next", "traceback")
_SUCCESS: Final = (
    *("values", "warnings", "cut_share", "preflight", "poison", "train", "evaluate", "rows"),
    *("keys", "versions", "plugins"),
)
