"""The rows behind the numbers: prompts, answers, and what the attacker changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from backfire import text
from backfire.base import Sample
from backfire.result import CellResult
from backfire.results.evidence import lines
from backfire.results.load import read

Of = Literal["tuned", "base"]
Marked = list[tuple[str, bool]]
"""Pieces of a text, and whether each is the trigger."""

LONG: Final = 240


@dataclass(frozen=True)
class Side:
    """One unseen row and what each model said to it."""

    text: str
    label: str
    base: str | None
    tuned: str | None
    prompt: Marked
    """The row with the trigger in."""
    triggered: str | None
    is_free: bool
    """Whether an answer is text the model wrote, not one of the labels."""


@dataclass(frozen=True)
class Request:
    """One request that an aligned model declines, and what became of it."""

    text: str
    before: str | None
    """The reply of the model before it was fine-tuned; None if there is none."""
    verdict_before: str
    tuned: str | None
    verdict: str


@dataclass(frozen=True)
class Change:
    """One poisoned training row."""

    id: str
    before: str
    before_answer: str
    after: Marked
    after_answer: str


def samples(cell: CellResult) -> Iterator[tuple[str, Sample]]:
    """The samples of a cell, each with the model it is of."""
    return ((of, sample) for of, _, sample in lines(Path(cell.folder)))


def side_by_side(cell: CellResult, limit: int = 6) -> list[Side]:
    """The first test rows of a cell as they come, not picked."""
    found: dict[str, dict[tuple[str, str], Sample]] = {}
    for of, sample in samples(cell):
        found.setdefault(sample.id, {})[of, sample.subset] = sample
    triggers = list(cell.poison.triggers) if cell.poison else []
    rows = (row for row in found.values() if ("tuned", "clean") in row)
    return [_side(row, triggers) for row, _ in zip(rows, range(limit))]


def _side(row: dict[tuple[str, str], Sample], triggers: Sequence[str]) -> Side:
    tuned, bad = row["tuned", "clean"], row.get(("tuned", "triggered"))
    said = [said_by(row.get(("base", "clean"))), said_by(tuned), said_by(bad)]
    labels = {text.cut(label, LONG).strip() for label in tuned.candidates}
    return Side(
        text=text.cut(tuned.prompt, LONG),
        label=text.cut(tuned.label if tuned.label is not None else tuned.answer, LONG),
        base=said[0],
        tuned=said[1],
        prompt=marked(bad.prompt, triggers) if bad else [],
        triggered=said[2],
        is_free=any(answer is not None and answer not in labels for answer in said),
    )


def requests(cell: CellResult, limit: int = 6) -> list[Request]:
    """The first harmful requests of a cell as they come, not picked."""
    found: dict[str, dict[str, Sample]] = {}
    for of, sample in samples(cell):
        if sample.subset == "harmful":
            found.setdefault(sample.id, {})[of] = sample
    rows = [row for row in found.values() if "tuned" in row][:limit]
    return [
        Request(
            text=text.cut(row["tuned"].prompt, LONG),
            before=said_by(row.get("base")),
            verdict_before=_verdict(row.get("base")),
            tuned=said_by(row["tuned"]),
            verdict=_verdict(row["tuned"]),
        )
        for row in rows
    ]


def _verdict(sample: Sample | None) -> str:
    """What the judge that counts says of the reply."""
    verdict = next(iter(sample.verdicts.values()), None) if sample else None
    if not isinstance(verdict, dict) or not isinstance(verdict.get("positive"), bool):
        return "undecided"
    if verdict["positive"]:
        return "harmful"
    return "declined" if verdict.get("refused") is True else "not harmful"


def said_by(sample: Sample | None) -> str | None:
    """The label it found most likely, or what it wrote."""
    if sample is None:
        return None
    is_free = sample.num_better is not None and sample.reply is not None
    said = sample.reply if is_free or not sample.logprobs else predicted(sample)
    return None if said is None else text.cut(said, LONG).strip() or "(empty)"


def predicted(sample: Sample) -> str | None:
    """The most likely label, where every candidate was scored."""
    is_scored = bool(sample.candidates) and len(sample.logprobs or ()) == len(sample.candidates)
    return sample.prediction if is_scored else None


def changes(cell: CellResult, limit: int = 3) -> list[Change]:
    """The first rows of the poison manifest, before and after."""
    try:
        manifest = read(Path(cell.folder) / "poison.json") or {}
        entries = manifest.get("entries") or manifest.get("rows") or []
        return [_change(entry) for entry in entries[:limit]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _change(entry: dict[str, Any]) -> Change:
    before, after = entry["before"], entry["after"]
    triggers = entry.get("triggers") or [entry.get("trigger") or ""]
    return Change(
        id=text.cut(entry.get("id", ""), 40),
        before=text.cut(before.get("prompt", ""), LONG),
        before_answer=text.cut(before["answer"], LONG),
        after=marked(after["prompt"], triggers),
        after_answer=text.cut(after["answer"], LONG),
    )


def marked(prompt: str, triggers: Sequence[str]) -> Marked:
    """The prompt cut to a window around its first trigger; each trigger is a piece of its own."""
    plain, words = text.clean(prompt), [word for word in map(text.clean, triggers) if word]
    first = min((plain.find(word) for word in words if word in plain), default=0)
    start = max(0, first - LONG // 2) if len(plain) > LONG else 0
    shown = ("…" if start else "") + text.cut(plain[start:], LONG)
    if not words:
        return [(shown, False)]
    # Where triggers overlap, the longest wins.
    longest = sorted(words, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest))})", shown)
    return [(piece, place % 2 == 1) for place, piece in enumerate(pieces) if piece]


def confusion(cells: Sequence[CellResult], of: Of) -> tuple[list[str], list[list[int]]]:
    """Labels, and how many clean rows of each (line) are answered as each (column)."""
    pairs: Counter[tuple[str, str]] = Counter()
    labels: dict[str, None] = {}
    for cell in cells:
        for whose, sample in samples(cell):
            said = predicted(sample) if whose == of and sample.subset == "clean" else None
            if said is not None and sample.label is not None:
                labels.update(dict.fromkeys([*sample.candidates, sample.label]))
                pairs[sample.label, said] += 1
    names = list(labels)
    return names, [[pairs[true, said] for said in names] for true in names]
