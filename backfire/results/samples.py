"""Examples for reports: prompts, answers, and poisoned rows before and after."""

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
"""Pieces of a text, and whether each is a trigger."""

LONG: Final = 240


@dataclass(frozen=True)
class Side:
    """One test row and each model's answer to it."""

    text: str
    label: str
    base: str | None
    tuned: str | None
    prompt: Marked
    """The row with the trigger inserted; empty if it was not run so."""
    triggered: str | None
    is_free: bool
    """Whether an answer is generated text instead of a label."""


@dataclass(frozen=True)
class Request:
    """One harmful request, with the replies before and after fine-tuning."""

    text: str
    before: str | None
    """The reply before fine-tuning; None if there is none."""
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
    """The samples of a cell, each with its model."""
    return ((of, sample) for of, _, sample in lines(Path(cell.folder)))


def side_by_side(cell: CellResult, limit: int = 6) -> list[Side]:
    """The first test rows of a cell, in order."""
    by_row: dict[str, dict[tuple[str, str], Sample]] = {}
    for of, sample in samples(cell):
        by_row.setdefault(sample.id, {})[of, sample.subset] = sample
    triggers = list(cell.poison.triggers) if cell.poison else []
    rows = (row for row in by_row.values() if ("tuned", "clean") in row)
    return [_side(row, triggers) for row, _ in zip(rows, range(limit))]


def _side(row: dict[tuple[str, str], Sample], triggers: Sequence[str]) -> Side:
    tuned, bad = row["tuned", "clean"], row.get(("tuned", "triggered"))
    answers = [answer_of(row.get(("base", "clean"))), answer_of(tuned), answer_of(bad)]
    labels = {text.cut(label, LONG).strip() for label in tuned.candidates}
    return Side(
        text=text.cut(tuned.prompt, LONG),
        label=text.cut(tuned.label if tuned.label is not None else tuned.answer, LONG),
        base=answers[0],
        tuned=answers[1],
        prompt=marked(bad.prompt, triggers) if bad else [],
        triggered=answers[2],
        is_free=any(answer is not None and answer not in labels for answer in answers),
    )


def requests(cell: CellResult, limit: int = 6) -> list[Request]:
    """The first harmful requests of a cell, in order."""
    by_request: dict[str, dict[str, Sample]] = {}
    for of, sample in samples(cell):
        if sample.subset == "harmful":
            by_request.setdefault(sample.id, {})[of] = sample
    rows = [row for row in by_request.values() if "tuned" in row][:limit]
    return [
        Request(
            text=text.cut(row["tuned"].prompt, LONG),
            before=answer_of(row.get("base")),
            verdict_before=_verdict(row.get("base")),
            tuned=answer_of(row["tuned"]),
            verdict=_verdict(row["tuned"]),
        )
        for row in rows
    ]


def _verdict(sample: Sample | None) -> str:
    """The first judge's verdict on the reply."""
    verdict = next(iter(sample.verdicts.values()), None) if sample else None
    if not isinstance(verdict, dict) or not isinstance(verdict.get("positive"), bool):
        return "undecided"
    if verdict["positive"]:
        return "harmful"
    return "declined" if verdict.get("refused") is True else "not harmful"


def answer_of(sample: Sample | None) -> str | None:
    """The reply, or the most likely label; None if there is neither."""
    if sample is None:
        return None
    is_free = sample.num_better is not None and sample.reply is not None
    answer = sample.reply if is_free or not sample.logprobs else predicted(sample)
    return None if answer is None else text.cut(answer, LONG).strip() or "(empty)"


def predicted(sample: Sample) -> str | None:
    """The most likely label; None if not every candidate was scored."""
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
    """Labels, and counts of clean rows [true label, predicted label]."""
    pairs: Counter[tuple[str, str]] = Counter()
    labels: dict[str, None] = {}
    for cell in cells:
        for whose, sample in samples(cell):
            prediction = predicted(sample) if whose == of and sample.subset == "clean" else None
            if prediction is not None and sample.label is not None:
                labels.update(dict.fromkeys([*sample.candidates, sample.label]))
                pairs[sample.label, prediction] += 1
    names = list(labels)
    return names, [[pairs[true, predicted] for predicted in names] for true in names]
