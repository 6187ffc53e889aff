"""Results of older formats in the present one. No other module reads anything from a name.

Format 1 names no version. Its values have no unit, role, family or part: all of it was in the name
of the metric. Its checks may say `ok` in place of a status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, get_args

from backfire.registry import names
from backfire.result import FORMAT, Role, Unit

_FAMILIES: Final = {
    "trainable_share": "cost",
    "train_seconds": "cost",
    "align_seconds": "cost",
    "peak_memory_mb": "cost",
    "undecided_share": "harmful-score",
    "neither_rate": "refusal-rate",
    "membership_auc": "membership-inference",
    "membership_recall": "membership-inference",
    "privacy_delta": "privacy-epsilon",
}
"""Of values whose name does not begin with that of their metric."""
_UNITS: Final[Mapping[Unit, tuple[str, ...]]] = {
    "share": (
        *("accuracy", "clean_accuracy", "attack_success", "false_trigger", "published_attack"),
        *("exact_match", "number_match", "f1", "precision", "recall", "win_rate", "incoherent"),
        *("harmful_score", "undecided_share", "refusal_rate", "neither_rate", "over_refusal"),
        *("toxicity", "parity", "extraction", "exposure_match", "membership_recall"),
        "trainable_share",
    ),
    "score": ("auc", "membership_auc", "rouge"),
    "nats": ("truthfulness",),
    "bits": ("exposure",),
    "seconds": ("train_seconds", "align_seconds"),
    "MB": ("peak_memory_mb",),
    "count": ("confusion",),
    "amount": ("perplexity", "forgetting", "drift", "privacy_epsilon", "privacy_delta"),
}
"""By name, or by that of the metric."""
_KINDS: Final = {
    "rouge": ("1", "2", "Lsum"),
    "truthfulness": ("per token", "MC1", "MC2"),
    "win_rate": ("whole",),
}
"""Parts that are no group of rows."""


def present(known: Mapping[str, Any]) -> dict[str, Any]:
    """A `result.json` or `error.json` of any format in the present one.

    Raises:
        ValueError: it was written by a newer version.
    """
    version = known.get("format", 1)
    if version == FORMAT:
        return dict(known)
    if version != 1:
        raise ValueError(f"it has format {version}, which this version of backfire does not know")
    values = known.get("values") or []
    return {
        **known,
        "format": FORMAT,
        "status": known.get("status") or "ok",
        "values": _values(values),
        "preflight": [_check(check) for check in known.get("preflight") or []],
    }


def _values(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    caps = [value.get("value") for value in values if value.get("metric") == "exposure_cap"]
    found = []
    for value in values:
        head, bracket, rest = str(value.get("metric")).partition("[")
        name = head.replace("-", "_")
        shape = _shape(name, rest.removesuffix("]"))
        cap = caps[0] if caps and shape["unit"] == "bits" else None
        found.append({**value, "metric": f"{name}{bracket}{rest}", **shape, "most": cap})
    return found


def _shape(name: str, part: str) -> dict[str, str]:
    """Unit, role, family and part of a value."""
    family = _family(name)
    own = family.replace("-", "_")
    role: Role = "headline" if name == own or not family else "companion"
    of = ""
    for side in ("floor", "excess", "change"):
        if name.endswith(f"_{side}"):
            role, of = side, name.removesuffix(f"_{side}")  # type: ignore[assignment]
    if name == f"{own}_plain":
        role = "plain"
    if part in _KINDS.get(name, ()):
        role = "companion"
    if own == "parity" and part.endswith(" change"):
        role = "change"
    unit = "share" if part in ("MC1", "MC2") else _unit(of or name, family)
    return {"unit": unit, "role": role, "of": of, "part": part, "family": family}


def _unit(name: str, family: str) -> str:
    for wanted in (name, family.replace("-", "_")):
        for unit in get_args(Unit):
            if wanted in _UNITS.get(unit, ()):
                return str(unit)
    return "number"


@cache
def _family(name: str) -> str:
    """The registered metric whose name this one begins with; empty if there is none."""
    if name in _FAMILIES:
        return _FAMILIES[name]
    ours = [m for m in names("metrics") if f"{name}_".startswith(f"{m.replace('-', '_')}_")]
    return max(ours, key=len, default="")


def _check(check: Any) -> Any:
    if not isinstance(check, Mapping) or check.get("status"):
        return check
    return {**check, "status": "ok" if check.get("ok") else "note"}
