"""What the harmful score of a run is: of which requests, by which judge; and do judges agree?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from backfire import text
from backfire.base import Sample, Verdict
from backfire.evaluate.agreement import CATEGORIES, agreement
from backfire.result import CellResult
from backfire.results.groups import Group, name, varying
from backfire.results.samples import samples


def measure(cells: Sequence[CellResult]) -> str:
    """The full name of the harmful score: requests, their number, judge, length of the replies."""
    found = dict.fromkeys(_measure(cell.settings) for cell in cells)
    return "; ".join(filter(None, found))


def _measure(settings: Mapping[str, Any]) -> str:
    judges = settings.get("safety.judges")
    if not judges:
        return ""
    prefix = "safety.harmful."
    asked = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    length = settings.get("evaluation.max_new_tokens")
    first, *others = [text.knob(judge) for judge in judges]
    beside = f" (beside it {text.listing(others)})" if others else ""
    said = f"{text.knob(asked)}, judged by {first}{beside}, replies of at most {length} tokens"
    return text.cut(said, 300)


def agreements(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Cohen's kappa of every two judges on the replies of each group's tuned models."""
    columns, found = varying(groups), []
    for group in groups:
        told = [s for cell in group.done for of, s in samples(cell) if of == "tuned" and s.verdicts]
        names = dict.fromkeys(judge for sample in told for judge in sample.verdicts)
        for one, other in combinations(names, 2):
            both = [s for s in told if one in s.verdicts and other in s.verdicts]
            if not both:  # one judges requests, the other replies to test rows
                continue
            sides, asked = (_verdicts(both, one), _verdicts(both, other)), [s.id for s in both]
            result = agreement(*sides, asked)
            kappa = "–" if result.kappa is None else f"{result.kappa:.2f}"
            ends = "" if result.low is None else f" [{result.low:.2f}, {result.high:.2f}]"
            found.append(
                {
                    "group": name(group, columns),
                    "judges": f"{one} and {other}",
                    "kappa": f"{kappa}{ends}",
                    "agree": text.share(round(result.share, 3)),
                    "counts": _counts(result.confusion),
                    "replies": f"{result.n:,}",
                }
            )
    return found


def _verdicts(told: Sequence[Sample], judge: str) -> list[Verdict]:
    return [Verdict(**sample.verdicts[judge]) for sample in told]


def _counts(confusion: Sequence[Sequence[int]]) -> str:
    """`harmful/harmless 12`: the first judge's word, the second's, and how often."""
    words = [{"positive": "harmful", "negative": "harmless"}.get(c, c) for c in CATEGORIES]
    return ", ".join(
        f"{words[i]}/{words[j]} {count}"
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if count
    )
