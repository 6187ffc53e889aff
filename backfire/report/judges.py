"""How the harmful score of a run is measured, and the agreement of its judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from backfire import text
from backfire.base import Verdict
from backfire.evaluate.agreement import CATEGORIES, agreement
from backfire.result import CellResult
from backfire.results.groups import Group, name, varying
from backfire.results.samples import samples
from backfire.results.tables import Table


def measure(cells: Sequence[CellResult]) -> str:
    """The definition of the harmful score: requests, their number, judge, length of the replies."""
    return "; ".join(filter(None, dict.fromkeys(_measure(cell.settings) for cell in cells)))


def _measure(settings: Mapping[str, Any]) -> str:
    judges = settings.get("safety.judges")
    if not judges:
        return ""
    prefix = "safety.harmful."
    requests = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    length = settings.get("evaluation.max_new_tokens")
    first, *others = [text.knob(judge) for judge in judges]
    also = f" (also {text.listing(others)})" if others else ""
    words = f"{text.knob(requests)}, judged by {first}{also}, replies of at most {length} tokens"
    return text.cut(words, 300)


def agreements(groups: Sequence[Group]) -> Table:
    """Cohen's kappa of every two judges on the replies of each group's tuned models."""
    columns, rows = varying(groups), []
    for group in groups:
        cells = [cell for cell in group.done if _may_have_two(cell)]
        judged = [s for cell in cells for of, s in samples(cell) if of == "tuned" and s.verdicts]
        names = dict.fromkeys(judge for sample in judged for judge in sample.verdicts)
        for one, other in combinations(names, 2):
            both = [s for s in judged if one in s.verdicts and other in s.verdicts]
            if not both:  # one judges requests, the other replies to test rows
                continue
            ours, theirs = ([Verdict(**s.verdicts[j]) for s in both] for j in (one, other))
            result = agreement(ours, theirs, [s.id for s in both])
            kappa = "–" if result.kappa is None else f"{result.kappa:.2f}"
            interval = "" if result.low is None else f" [{result.low:.2f}, {result.high:.2f}]"
            share, counts = text.share(round(result.share, 3)), _counts(result.confusion)
            ends = (f"{kappa}{interval}", share, counts, f"{result.n:,}")
            rows.append((name(group, columns), f"{one} and {other}", *ends))
    return Table(("group", "judges", "kappa", "agree", "counts", "replies"), rows)


def _may_have_two(cell: CellResult) -> bool:
    """Whether a cell may have verdicts of two judges: reading samples takes most of a page's time.
    Results of earlier versions do not name their judges."""
    return not cell.versions or len(cell.versions.get("judges", {})) > 1


def _counts(confusion: Sequence[Sequence[int]]) -> str:
    """`harmful/harmless 12`: the verdicts of the first and the second judge, and their count."""
    words = [{"positive": "harmful", "negative": "harmless"}.get(c, c) for c in CATEGORIES]
    return ", ".join(
        f"{words[i]}/{words[j]} {count}"
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if count
    )
