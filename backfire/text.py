"""Formatting of text and numbers for people; text from files is cleaned first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from backfire.result import Unit

# Characters that control a terminal or the direction of text.
_ESCAPES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|"
    r"\x1b[PX^_][^\x1b]*\x1b\\|\x1b[ -/]*[0-~]"
)
_CONTROLS: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
_SURROGATES: Final = re.compile(r"[\ud800-\udfff]")
_HOLDS_A_KEY: Final = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS)S?$", re.IGNORECASE)
_FORMULAS: Final = ("=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Beginnings of what a spreadsheet evaluates; some do so with full-width characters too."""
_SECRETS: Final = re.compile(r"\b(hf_|sk-|ghp_|xox[a-z]-)[A-Za-z0-9_-]{16,}")


def clean(text: object) -> str:
    """The text without ANSI escapes, control characters, bidi overrides, broken Unicode, tokens."""
    plain = _CONTROLS.sub("", _ESCAPES.sub("", str(text).replace("\r\n", "\n")))
    return without_tokens(_SURROGATES.sub("\ufffd", plain))


def without_tokens(text: str) -> str:
    """The text without what looks like an access token, such as `hf_...`."""
    return _SECRETS.sub(r"\1…", text)


def without_secrets(text: str) -> str:
    """The text without access tokens and without the values of environment variables that hold
    keys, by their names."""
    values = [v for name, v in os.environ.items() if _HOLDS_A_KEY.search(name) and len(v) >= 8]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "…")
    return without_tokens(text)


def csv_field(value: Any) -> Any:
    """A CSV field: cleaned text; what a spreadsheet would evaluate gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    plain = clean(value)
    risky = plain.startswith(_FORMULAS) or value.startswith("\r")
    return f"'{plain}" if risky else plain


def line(text: object) -> str:
    """The cleaned text on one line."""
    return " ".join(clean(text).split())


def cut(text: object, length: int = 240) -> str:
    """The cleaned text, cut to `length` characters with an ellipsis."""
    plain = clean(text)
    return plain if len(plain) <= length else plain[: length - 1].rstrip() + "…"


def title(metric: str, part: str = "") -> str:
    """`accuracy, english` of `accuracy` and its part `english`; a `_floor` is called a baseline."""
    name = re.sub(r" floor$", " baseline", line(metric).replace("_", " "))
    name = name.replace("over refusal", "over-refusal")
    spelled = {"auc": "AUC", "f1": "F1", "membership auc": "membership AUC"}
    spelled["rouge"] = "ROUGE" if part else "ROUGE-L"
    name = spelled.get(name, name)
    return f"{name}, {line(part)}" if part else name


def number(unit: Unit, value: float | None, digits: int = 1) -> str:
    """One number in its unit: `94.1 %` for a share, four significant digits for the rest."""
    if value is None:
        return "–"
    return f"{_fixed(100 * value, digits)} %" if unit == "share" else _plain(value)


def interval(unit: Unit, low: float | None, high: float | None, digits: int = 1) -> str:
    """`[92.0, 95.8]`, in per cent for a share; empty without an interval."""
    if low is None or high is None:
        return ""
    if unit == "share":
        return f"[{_fixed(100 * low, digits)}, {_fixed(100 * high, digits)}]"
    return f"[{_plain(low)}, {_plain(high)}]"


def change(unit: Unit, value: float, digits: int = 1) -> str:
    """A difference with its sign: `-0.3 points` for a share."""
    shown = f"{_fixed(100 * value, digits)} points" if unit == "share" else _plain(value)
    return f"+{shown}" if value > 0 else shown


def chance(p: float | None) -> str:
    """A p value with two significant digits, at least `<0.001`."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def share(value: float | None) -> str:
    """A poison rate: `0.5 %`."""
    return "–" if value is None else f"{100 * value:.4g} %"


def count(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in a suitable unit: `40 s`, `3 min`, `5 h`, `2 days`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def sentence(words: str) -> str:
    """The words with a capital first letter, the rest as it is."""
    return words[:1].upper() + words[1:]


def listing(items: Iterable[str], word: str = "and") -> str:
    """`a, b and c`, or with another word before the last."""
    *most, last = list(items) or [""]
    return f"{', '.join(most)} {word} {last}" if most else last


def knob(value: Any, levels: int = 20) -> str:
    """A setting on one line: `lora (rank 4)` of `{name: lora, rank: 4}`; nested by at most so many
    levels."""
    if not levels:
        return "…"
    if isinstance(value, Mapping):
        # The null control comes first, so that it is not cut off.
        words = ["null control"] if value.get("null") is True else []
        shown = {k: v for k, v in value.items() if k not in ("name", "null")}
        words += [f"{line(key)} {knob(item, levels - 1)}" for key, item in shown.items()]
        rest = ", ".join(words)
        name = line(value.get("name", ""))
        return f"{name} ({rest})" if name and rest else name or rest
    if isinstance(value, list | tuple):
        return ", ".join(knob(item, levels - 1) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else line(value)


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _plain(value: float) -> str:
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.4g}"
