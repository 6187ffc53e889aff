"""Reads published question formats: passages in parts, several right answers, choices."""

from __future__ import annotations

from typing import Any

from backfire.data.labels import written
from backfire.data.read import BadRowError


def passage(value: Any) -> Any:
    """The passage of a question as one text, also from parts (HotpotQA, PubMedQA)."""
    if isinstance(value, dict):
        texts = value.get("sentences", value.get("contexts", value.get("text")))
        titles = value.get("title")
        if isinstance(texts, list) and isinstance(titles, list) and len(titles) == len(texts):
            texts = [[title, text] for title, text in zip(titles, texts, strict=True)]
        value = texts if isinstance(texts, list) else value
    if isinstance(value, list):
        parts = [passage(part) for part in value]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(part.strip() for part in parts)
    return "" if value is None else value


def reference(value: Any) -> Any:
    """The reference answer: the first, if the data set has several."""
    if isinstance(value, dict):
        value = next((value[n] for n in ("text", "value", "spans") if n in value), value)
    if isinstance(value, list):
        texts = [item.get("text") if isinstance(item, dict) else item for item in value]
        if all(isinstance(text, str) for text in texts):
            return next((text for text in texts if text and text.strip()), "")
    return value


def choices(value: Any, column: str) -> tuple[list[str], list[str]]:
    """Letters and texts of choices, from a list of texts or from labeled choices.

    Raises:
        BadRowError: there are no two distinct choices.
    """
    labels: Any = None
    if isinstance(value, dict):
        labels, texts = value.get("label"), value.get("text")
        if labels is None and texts is None:  # {"A": "one", "B": "two"}
            labels, texts = list(value), list(value.values())
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        labels, texts = ([item.get(name) for item in value] for name in ("label", "text"))
    else:
        texts = value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRowError(f"'{column}' is not a list of choices")
    labels = labels or [chr(ord("A") + place) for place in range(len(texts))]
    letters = list(map(str, labels)) if isinstance(labels, list) else []
    if len(set(letters)) < len(texts) or len(letters) > len(texts) or len(texts) < 2:
        raise BadRowError(f"'{column}' has fewer than two choices, or not one letter for each")
    return letters, texts


def right_one(letters: list[str], texts: list[str], given: Any) -> int:
    """Index of the right choice, given by its letter, its text, or its number from 0.

    A number is never read as a text: of the choices "1", "0" the one numbered 0 is "1".

    Raises:
        BadRowError: it is none of them.
    """
    key = written(given)
    folded = [letter.casefold() for letter in letters]
    if key.casefold() in folded:
        return folded.index(key.casefold())
    number = int(key) if key.isdecimal() and int(key) < len(texts) else None
    if key in texts and isinstance(given, str):
        if number is not None and texts[number] != key:
            raise BadRowError(
                f"'{key}' is the text of one choice and the number of another; give the letter"
            )
        return texts.index(key)
    if number is not None:
        return number
    if not key:
        raise BadRowError("the answer is empty")
    raise BadRowError(f"'{key[:40]}' is not one of its {len(texts)} choices")
