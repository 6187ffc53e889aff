"""Whether the two sides give equal results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell
from benchmarks.sides import NAMES, Scores, Training, side

GROUPED, TRL = "baseline, grouped", "trl"


@dataclass(frozen=True)
class Round:
    """Results of one repetition, by side."""

    training: dict[str, Training]
    scores: dict[str, Scores]
    replies: dict[str, list[str]]
    untuned: dict[str, list[str]]


def compare(cell: Cell, results: Round, folder: Path) -> dict[str, Any]:
    """Differences between the two sides, on the same weights and on each side's own weights."""
    a, b = (results.training[name].losses for name in NAMES)
    steps = sorted(a.keys() & b.keys())
    trl = results.training[TRL].losses if TRL in results.training else None
    work = side("baseline")
    own = work.load(cell, folder / "baseline")
    own_scores, own_replies = work.scores(cell, own), work.replies(cell, own)
    ours = results.scores["backfire"]
    return {
        "same tokens": same_tokens(cell),
        "steps compared": len(steps),
        "loss difference": max(abs(a[step] - b[step]) for step in steps),
        "loss difference, trl": max(abs(trl[step] - b[step]) for step in steps) if trl else None,
        "last loss": {"baseline": a[steps[-1]], "backfire": b[steps[-1]]},
        "log-likelihood difference": max(
            difference(ours, results.scores[who]) for who in ("baseline", GROUPED)
        ),
        "log-likelihood difference, own weights": difference(ours, own_scores),
        "equal replies": share_equal(*results.replies.values()),
        "equal replies of the base": share_equal(*results.untuned.values()),
        "equal replies, own weights": share_equal(results.replies["backfire"], own_replies),
        "accuracy": {"baseline": accuracy(cell, own_scores), "backfire": accuracy(cell, ours)},
        "exact match": {
            "baseline": share_equal(own_replies, [row.answer for row in cell.test]),
            "backfire": share_equal(results.replies["backfire"], [row.answer for row in cell.test]),
        },
    }


def difference(left: Scores, right: Scores) -> float:
    """The largest absolute difference over all rows and candidates."""
    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(x - y) for x, y in pairs)


def share_equal(left: Sequence[str], right: Sequence[str]) -> float:
    return sum(a.strip() == b.strip() for a, b in zip(left, right, strict=True)) / len(left)


def accuracy(cell: Cell, scores: Scores) -> float:
    best = [row.candidates[line.index(max(line))] for row, line in zip(cell.test, scores)]
    return sum(name == row.label for name, row in zip(best, cell.test)) / len(best)


def same_tokens(cell: Cell) -> bool:
    """Whether both sides have the same token ids and prompt length for every row."""
    from transformers import AutoTokenizer

    from benchmarks.baseline import tokenize

    tokenizer = AutoTokenizer.from_pretrained(str(cell.base))
    return all(
        [(item.ids, item.num_prompt) for item in items]
        == [(example.ids, example.num_prompt) for example in tokenize(cell, rows, tokenizer)]
        for items, rows in zip(cell.rendered(), (cell.train, cell.test), strict=True)
    )
