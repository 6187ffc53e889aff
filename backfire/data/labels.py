"""Labels: how recipes name them, and their spellings in data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any
from unicodedata import normalize

from backfire.base.normalize import folded
from backfire.data.columns import PROMPTS, fold
from backfire.errors import UserError

# Unquoted, YAML 1.1 and tables read these as truth values.
_TRUTH = {"true": ("true", "yes", "on", "1"), "false": ("false", "no", "off", "0")}
_GOOD = ("good", "safe", "correct", "desirable", "chosen")
_BAD = ("-1", "bad", "unsafe", "wrong", "incorrect", "undesirable", "rejected")
_FRACTION = re.compile(r"-?\d+[.,]\d+")
_WHOLE = re.compile(r"(-?\d+)\.0+")


def check_labels(labels: Any) -> Any:
    """Labels as a map, from the list or map (with any keys) of a recipe.

    Raises:
        UserError: they are truth values, fewer than two, or too alike.
    """
    if isinstance(labels, list):
        labels = [str(name) if type(name) is int else name for name in labels]
        # A number as a name means itself, not a place in the list.
        are_names = all(isinstance(name, str) for name in labels)
        if are_names and any(name.strip().isdigit() for name in labels):
            labels = {name: name for name in labels}
        else:
            labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping):
        return labels
    if any(isinstance(name, bool) for name in labels.values()):
        raise UserError(
            "labels: true and false are truth values; write labels in quotes, as in "
            'labels: ["no", "yes"].'
        )
    if labels and len({folded(str(name)) for name in labels.values()}) < 2:
        raise UserError("labels: a task needs at least two labels.")
    by_form: dict[str, str] = {}
    for name in map(str, labels.values()):
        if (other := by_form.setdefault(folded(name), name)) != name:
            raise UserError(
                f"labels: '{other}' and '{name}' differ only in case or typography, so a row's "
                "label would be ambiguous; rename one."
            )
    return {str(raw): name for raw, name in labels.items()}


def spellings(labels: Mapping[str, str]) -> dict[str, str]:
    """Every spelling of a label (folded) -> its name."""
    names = {folded(written(name)): name for name in labels.values()}
    names |= {folded(written(raw)): name for raw, name in labels.items()}
    if len(labels) == 2:
        # `{No: ham}` may arrive as `{False: ham}`, and a column of truth values means 0 and 1.
        for forms in _TRUTH.values():
            for given in [form for form in forms if form in names]:
                names |= {form: names[given] for form in forms if form not in names}
    return names


def written(value: Any) -> str:
    """A label as written in the data; empty if there is none."""
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    raw = normalize("NFC", plain(value) or "").strip()
    whole = _WHOLE.fullmatch(raw)  # pandas writes integers of a column with gaps as 1.0
    return whole[1] if whole else raw


def plain(value: Any) -> str | None:
    """A string, number or truth value as text; None for anything else, and for NaN."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | Decimal) and not math.isnan(value):
        return str(value)
    return None


def truth(value: Any) -> bool | None:
    """A truth value in any usual spelling; None for anything else."""
    word = written(value).casefold()
    if word in (*_TRUTH["true"], *_GOOD):
        return True
    if word in (*_TRUTH["false"], *_BAD):
        return False
    return None


def ask_for(found: Iterable[str]) -> str:
    """A hint how to name labels; `found` are those in the data, in any order."""
    labels = sorted(found, key=lambda raw: (len(raw) if raw.lstrip("-").isdigit() else 0, raw))
    if any(map(_FRACTION.fullmatch, labels)):
        return "numbers with fractions are scores, not labels; convert them to classes first"
    shown = [raw if len(raw) <= 30 else f"{raw[:29]}…" for raw in labels[:6]]
    if all(raw.lstrip("-").isdigit() for raw in labels):
        words = ", ".join(f"{raw}: name" for raw in shown)
        return f"name its labels, as in data.labels={{{words}{_more(labels)}}}"
    return f"name all labels, as in data.labels=[{', '.join(shown)}{_more(labels)}]"


def if_not(columns: Mapping[str, str]) -> str:
    """A hint for the case that the recognized label column is not one."""
    text, column = columns.get("text", ""), columns["label"]
    if column in ("label", "target") and fold(text) in PROMPTS and text != "text":
        return f"; if it is an answer: data.columns={{prompt: {text}, answer: {column}}}"
    if not text or column == "label":
        return ""
    return f"; if it is not a label: data.columns={{text: {text}}}"


def _more(labels: list[str]) -> str:
    return ", ..." if len(labels) > 6 or len(labels) < 2 else ""
