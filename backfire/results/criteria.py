"""What the intervals of groups support; of a single seed nothing is claimed beyond its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from backfire import text
from backfire.results.groups import KNOBS, Gap, Group, Stat, difference, headlines, picked
from backfire.results.intervals import at, unpaired

THIS_MODEL: Final = "in this model only"


def attacked(groups: Sequence[Group]) -> list[Group]:
    """The poisoned groups whose attack success was measured."""
    return [group for group in groups if group.poisoned and group.get("attack_success")]


def is_above_floor(group: Group, tests: int = 1) -> bool:
    """Whether attack success is above the clean-model baseline: the interval of the difference,
    for `tests` comparisons at once, is above zero. Never for one seed."""
    gap = above_floor(group, tests=tests)
    return gap is not None and gap.is_clear and gap.difference > 0


def above_floor(group: Group, metric: str = "attack_success", tests: int = 1) -> Gap | None:
    """The metric minus its floor, on the same rows."""
    excess, floor = group.side(metric, "excess"), group.side(metric, "floor")
    if excess and (stat := at(group, excess.metric, tests)):
        return _as_gap(stat)
    now, before = at(group, metric, tests), floor and at(group, floor.metric, tests)
    return unpaired(before, now) if now and before else None


def onset(line: Sequence[Group]) -> Group | None:
    """The lowest poison rate of one attack from which all are above the floor; `line` is in order
    of the rate. Tested from the highest down to the first that is not, so that the error of all
    tests together is at most 5 % (fixed sequence, Maurer, Hothorn & Lehmacher 1995)."""
    lowest = None
    for group in reversed(line):
        if not is_above_floor(group):
            break
        lowest = group
    return lowest


def _as_gap(change: Stat) -> Gap:
    assert change.value is not None
    ends = (change.low, change.high)
    return Gap(change.unit, change.value, *ends, seeds=change.seeds, scope=change.scope)


def accuracy(group: Group) -> Stat | None:
    """The group's accuracy on clean rows, by the first such metric that was measured."""
    return next((s for metric in picked([group], "accuracy") if (s := group.get(metric))), None)


def cost(group: Group, groups: Sequence[Group], tests: int = 1) -> Gap | None:
    """Change of accuracy on clean rows due to the poison: paired against the clean twin if that was
    measured, else against the group without poison."""
    change = group.side("clean_accuracy", "change")
    if change and (stat := at(group, change.metric, tests)):
        return _as_gap(stat)
    other, after = twin(group, groups), accuracy(group)
    return difference(other, group, after.metric, tests) if other and after else None


def twin(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group that differs only in having no poison."""
    return next((g for g in siblings(group, groups, "attack") if not g.poisoned), None)


def siblings(group: Group, groups: Sequence[Group], knob: str) -> list[Group]:
    """The groups that agree in all but this knob (and the poison rate, if it is the attack), also
    in settings that are no axis: calls with other edits may have added them to the run."""
    varied = ("attack", "rate") if knob == "attack" else (knob,)
    same = [other for other in KNOBS if other not in varied]
    axes = group.axes_without(knob)
    return [
        g
        for g in groups
        if alike(g, group, same) and g.axes_without(knob) == axes and _agree(g, group, knob)
    ]


def _agree(a: Group, b: Group, knob: str) -> bool:
    """Whether the settings agree, but for this knob, what follows from a defense, and what is
    measured; of a cell that failed early they are not known."""
    excluded = (knob, "metrics", "safety", "align")
    ours, theirs = (
        {key: value for key, value in one.settings.items() if not key.startswith(excluded)}
        for one in (a, b)
    )
    return not ours or not theirs or ours == theirs


def tunings(groups: Sequence[Group]) -> list[tuple[Group, Group, list[str]]]:
    """Each unpoisoned tuned group with its untuned base, and up to two metrics both have."""
    pairs, preferred = [], picked(groups, "tuning")
    for tuned in [group for group in groups if group.method != "none" and not group.poisoned]:
        base = _untuned(tuned, groups)
        metrics = [metric for metric in headlines(groups) if tuned.get(metric)]
        shared = [metric for metric in metrics if base and base.get(metric)]
        shared.sort(key=lambda metric: metric not in preferred)
        if base and shared:
            pairs.append((base, tuned, shared[:2]))
    return pairs


def _untuned(tuned: Group, groups: Sequence[Group]) -> Group | None:
    """The base of this group; of several, the one evaluated with the same settings."""
    bases = [g for g in groups if g.method == "none" and alike(g, tuned, ("model", "data"))]
    same = [g for g in bases if _untuned_axes(g) == _untuned_axes(tuned)]
    return next(iter(same if len(bases) > 1 else bases), None)


def _untuned_axes(group: Group) -> dict[str, Any]:
    """The axes that an untuned model depends on."""
    parts = ("data", "model", "template", "align", "evaluation")
    return {key: value for key, value in group.axes.items() if key.startswith(parts)}


def gains(metric: str, base: Group, tuned: Group) -> dict[str, Gap]:
    """Part (such as a language) -> gain, smallest first; the intervals hold for all at once."""
    parts = [
        s for s in tuned.stats.values() if s.part and s.name == metric and s.role == "headline"
    ]
    gaps = {s.part: difference(base, tuned, s.metric, len(parts)) for s in parts}
    by_part = {text.line(part): gap for part, gap in gaps.items() if gap is not None}
    return dict(sorted(by_part.items(), key=lambda item: item[1].difference))


def change_words(metric: str, base: Group, tuned: Group) -> str:
    """`raises accuracy from 35.0 % to 82.0 % (+47.0 points [42.8, 51.2])`; for one seed `changes`,
    in this model only."""
    a, b, gap = base.get(metric), tuned.get(metric), difference(base, tuned, metric)
    assert a is not None and b is not None and gap is not None
    title, before, after = a.title, a.number(), b.number()
    if gap.covers_seeds and not gap.is_clear:
        return f"does not clearly change {title}: {before} to {after} ({gap.shown})"
    verb = "changes"
    if gap.is_clear:
        verb = "raises" if gap.difference > 0 else "lowers"
    only = f" {THIS_MODEL}" if gap.scope == "model" else ""
    return f"{verb} {title} from {before} to {after}{only} ({gap.shown})"


def tie_note(least: Group, most: Group, metric: str, groups: int) -> str:
    """What to add to the lowest and highest of this many groups if they do not differ clearly."""
    gap = difference(least, most, metric, groups * (groups - 1) // 2)
    if gap is None or gap.is_clear:
        return ""
    if gap.covers_seeds:
        return "; the intervals do not separate them"
    return "; one seed does not separate them" if gap.scope == "model" else ""


def rate_words(group: Group, where: str = "") -> str:
    """`a poison rate of 5 % (100 of 2,000 rows; lora)`."""
    inside = "; ".join(filter(None, (poisoned_of(group), where)))
    return f"a poison rate of {text.share(group.rate)}" + (f" ({inside})" if inside else "")


def poisoned_of(group: Group) -> str:
    """`100 of 2,000 rows`; empty if that was not recorded."""
    poison = next((cell.poison for cell in group.done if cell.poison), None)
    if poison is None or poison.rows is None or poison.poisoned_rows is None:
        return ""
    return f"{poison.poisoned_rows:,} of {poison.rows:,} rows"


def extremes(groups: Sequence[Group], metric: str) -> tuple[Group, Group, int] | None:
    """The lowest and the highest group in this metric, and the number of groups that have it."""
    values = [(stat.value or 0.0, group) for group in groups if (stat := group.get(metric))]
    if not values:
        return None
    least, most = (pick(values, key=lambda pair: pair[0])[1] for pick in (min, max))
    return least, most, len(values)


def alike(a: Group, b: Group, knobs: Sequence[str]) -> bool:
    """Whether two groups agree on these knobs."""
    return all(getattr(a, knob) == getattr(b, knob) for knob in knobs)
