"""Conversion of older result formats. No other module derives anything from a metric's name.

Format 1 has no `format` field. Its values have no unit, role, family or part; they follow from the
metric's name. Its checks may have `ok` instead of a status.
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
    "clean_flag_rate": "scan",
    "false_alarms": "alarms",
}
"""Values whose name does not begin with their metric's."""
_UNITS: Final[Mapping[Unit, tuple[str, ...]]] = {
    "share": (
        *("accuracy", "clean_accuracy", "attack_success", "false_trigger", "published_attack"),
        *("exact_match", "number_match", "f1", "precision", "recall", "win_rate", "incoherent"),
        *("harmful_score", "undecided_share", "refusal_rate", "neither_rate", "over_refusal"),
        *("toxicity", "parity", "extraction", "exposure_match", "membership_recall"),
        *("trainable_share", "scan", "alarms", "false_alarms"),
    ),
    "score": (
        "auc",
        "membership_auc",
        "rouge",
        "scan_auroc",
        "scan_average_precision",
        "defection_probe",
    ),
    "nats": ("truthfulness",),
    "bits": ("exposure",),
    "seconds": ("train_seconds", "align_seconds"),
    "MB": ("peak_memory_mb",),
    "count": ("confusion",),
    "amount": ("perplexity", "forgetting", "drift", "privacy_epsilon", "privacy_delta"),
}
"""By the name of the value or of its metric."""
_KINDS: Final = {
    "rouge": ("1", "2", "Lsum"),
    "truthfulness": ("per token", "MC1", "MC2"),
    "win_rate": ("whole",),
}
"""Parts that are not groups of rows."""


def present(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a `result.json` or `error.json` of any format to the current one.

    Raises:
        ValueError: it was written by a newer version.
    """
    version = content.get("format", 1)
    if version == FORMAT:
        return dict(content)
    if version != 1:
        raise ValueError(f"format {version} is newer than this version of backfire")
    values = content.get("values") or []
    return {
        **content,
        "format": FORMAT,
        "status": content.get("status") or "ok",
        "values": _values(values),
        "preflight": [_check(check) for check in content.get("preflight") or []],
    }


def _values(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    caps = [value.get("value") for value in values if value.get("metric") == "exposure_cap"]
    converted = []
    for value in values:
        head, bracket, rest = str(value.get("metric")).partition("[")
        name = head.replace("-", "_")
        shape = _shape(name, rest.removesuffix("]"))
        cap = caps[0] if caps and shape["unit"] == "bits" else None
        converted.append({**value, "metric": f"{name}{bracket}{rest}", **shape, "most": cap})
    return converted


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
    """The registered metric whose name is the longest prefix of this one; empty if none is."""
    if name in _FAMILIES:
        return _FAMILIES[name]
    ours = [m for m in names("metrics") if f"{name}_".startswith(f"{m.replace('-', '_')}_")]
    return max(ours, key=len, default="")


def _check(check: Any) -> Any:
    if not isinstance(check, Mapping) or check.get("status"):
        return check
    return {**check, "status": "ok" if check.get("ok") else "note"}
