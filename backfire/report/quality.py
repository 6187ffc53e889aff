"""What a run says of rows made worse without a trigger: the task itself against the dose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from backfire import text
from backfire.results.criteria import alike, moved, poisoned_of, twin
from backfire.results.groups import Group, difference, headlines, name, picked, varying


def spoiled(groups: Sequence[Group]) -> list[Group]:
    """The groups with poison that shows in the task's own metrics, or nowhere."""
    return [
        group
        for group in groups
        if group.poisoned and not group.get("attack_success") and not group.get("harmful_score")
    ]


def metrics(groups: Sequence[Group]) -> list[str]:
    """What to look at, most telling first."""
    known = [metric for metric in headlines(groups) if any(g.get(metric) for g in spoiled(groups))]
    return [metric for metric in picked(groups, "quality") if metric in known] or known[:2]


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """Of each metric, what the highest dose of each attack does."""
    for metric in metrics(groups):
        yield from said(metric, groups)


def said(metric: str, groups: Sequence[Group]) -> Iterator[str]:
    """What the highest dose of each attack, method and defense does to a metric."""
    lines = _lines(metric, groups)
    columns = [c for c in varying([line[-1] for line in lines]) if c != "rate"]
    for clean, *doses in lines:
        worst = doses[-1]
        which = f" ({name(worst, columns)})" if columns and len(lines) > 1 else ""
        rows = f"Poisoning {_rows(worst)}{which}"
        yield f"{rows} {moved(metric, clean, worst)}{_order(metric, [clean, *doses])}."


def _lines(metric: str, groups: Sequence[Group]) -> list[list[Group]]:
    """The clean group and then its doses, for whatever else tells the groups apart."""
    lines: list[list[Group]] = []
    for group in sorted(spoiled(groups), key=lambda group: group.rate):
        clean = twin(group, groups)
        if not group.get(metric) or clean is None or not clean.get(metric):
            continue
        known = (line for line in lines if line[0] is clean and alike(line[-1], group, ("attack",)))
        if line := next(known, None):
            line.append(group)
        else:
            lines.append([clean, group])
    return lines


def _order(metric: str, line: Sequence[Group]) -> str:
    """Whether the doses stand in order, as far as their intervals tell."""
    if len(line) < 3:
        return ""
    whole = difference(line[0], line[-1], metric)
    if whole is None or not whole.is_clear:
        return ""
    steps = [gap for a, b in pairwise(line) if (gap := difference(a, b, metric))]
    back = sum(step.is_clear and step.difference * whole.difference < 0 for step in steps)
    if back:
        return f"; {text.count(back, 'step')} between doses clearly the other way"
    return "; no step between doses goes clearly the other way"


def _rows(group: Group) -> str:
    """`33 % of the rows (330 of 1,000)`."""
    counted = poisoned_of(group)
    return f"{text.share(group.rate)} of the rows" + (f" ({counted})" if counted else "")
