"""Sentences about poison without a trigger: the task's own metrics by poison rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from backfire import text
from backfire.results.criteria import alike, change_words, poisoned_of, twin
from backfire.results.groups import Group, difference, headlines, name, picked, varying


def corrupted(groups: Sequence[Group]) -> list[Group]:
    """The poisoned groups with neither an attack success nor a harmful score."""
    return [
        group
        for group in groups
        if group.poisoned and not group.get("attack_success") and not group.get("harmful_score")
    ]


def metrics(groups: Sequence[Group]) -> list[str]:
    """The metrics to report, the most important first."""
    measured = [
        metric for metric in headlines(groups) if any(g.get(metric) for g in corrupted(groups))
    ]
    return [metric for metric in picked(groups, "quality") if metric in measured] or measured[:2]


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """For each metric the effect of each attack's highest poison rate."""
    for metric in metrics(groups):
        yield from metric_sentences(metric, groups)


def metric_sentences(metric: str, groups: Sequence[Group]) -> Iterator[str]:
    """The effect of the highest poison rate on a metric, for each attack, method and defense."""
    lines = _lines(metric, groups)
    columns = [c for c in varying([line[-1] for line in lines]) if c != "rate"]
    for clean, *poisoned in lines:
        worst = poisoned[-1]
        which = f" ({name(worst, columns)})" if columns and len(lines) > 1 else ""
        rows = f"Poisoning {_rows(worst)}{which}"
        yield f"{rows} {change_words(metric, clean, worst)}{_order(metric, [clean, *poisoned])}."


def _lines(metric: str, groups: Sequence[Group]) -> list[list[Group]]:
    """Lists of a clean group followed by its poisoned ones by rate, one per attack and setting."""
    lines: list[list[Group]] = []
    for group in sorted(corrupted(groups), key=lambda group: group.rate):
        clean = twin(group, groups)
        if not group.get(metric) or clean is None or not clean.get(metric):
            continue
        same = (line for line in lines if line[0] is clean and alike(line[-1], group, ("attack",)))
        if line := next(same, None):
            line.append(group)
        else:
            lines.append([clean, group])
    return lines


def _order(metric: str, line: Sequence[Group]) -> str:
    """Whether the metric changes in one direction with the poison rate, by the intervals."""
    if len(line) < 3:
        return ""
    whole = difference(line[0], line[-1], metric)
    if whole is None or not whole.is_clear:
        return ""
    steps = [gap for a, b in pairwise(line) if (gap := difference(a, b, metric))]
    back = sum(step.is_clear and step.difference * whole.difference < 0 for step in steps)
    steps_back = text.count(back, "step") if back else "no step"
    return f"; {steps_back} between poison rates clearly in the other direction"


def _rows(group: Group) -> str:
    """`33 % (330 of 1,000 rows)`."""
    counts = poisoned_of(group)
    return f"{text.share(group.rate)}" + (f" ({counts})" if counts else " of the rows")
