"""What may be claimed of groups: what the intervals bear; of one seed, its numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from backfire import text
from backfire.results.groups import Gap, Group, Stat, difference, headlines, picked
from backfire.results.intervals import apart, at

THIS_MODEL: Final = "in this model only"


def attacked(groups: Sequence[Group]) -> list[Group]:
    """The poisoned groups whose attack success was measured."""
    return [group for group in groups if group.poisoned and group.get("attack_success")]


def is_above_floor(group: Group, tests: int = 1) -> bool:
    """Whether attack success is above the clean model's, by the interval of the difference, which
    one seed does not give. It holds for so many `tests` at once."""
    gap = above_floor(group, tests=tests)
    return gap is not None and gap.is_clear and gap.difference > 0


def above_floor(group: Group, metric: str = "attack_success", tests: int = 1) -> Gap | None:
    """The metric less its floor, on the same rows."""
    excess, floor = group.side(metric, "excess"), group.side(metric, "floor")
    if excess and (found := at(group, excess.metric, tests)):
        return _as_gap(found)
    now, before = at(group, metric, tests), floor and at(group, floor.metric, tests)
    return apart(before, now) if now and before else None


def onset(line: Sequence[Group]) -> Group | None:
    """Of the doses of one attack, least first, the first from which all are above the floor. Tested
    from the highest down to the first that is not, so that together they err in 5 % at most (a
    fixed sequence, Maurer, Hothorn & Lehmacher 1995)."""
    found = None
    for group in reversed(line):
        if not is_above_floor(group):
            break
        found = group
    return found


def _as_gap(change: Stat) -> Gap:
    assert change.value is not None
    ends = (change.low, change.high)
    return Gap(change.unit, change.value, *ends, seeds=change.seeds, scope=change.scope)


def accuracy(group: Group) -> Stat | None:
    """The group's accuracy on clean rows, by whichever metric was measured."""
    return next((s for metric in picked([group], "accuracy") if (s := group.get(metric))), None)


def cost(group: Group, groups: Sequence[Group], tests: int = 1) -> Gap | None:
    """What the poison does to accuracy on clean rows: against the clean twin pair by pair if that
    was measured, else against the group without poison."""
    change = group.side("clean_accuracy", "change")
    if change and (found := at(group, change.metric, tests)):
        return _as_gap(found)
    other, after = twin(group, groups), accuracy(group)
    return difference(other, group, after.metric, tests) if other and after else None


def twin(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group that differs only in having no poison."""
    rest = group.beside("attack")
    clean = [other for other in groups if not other.poisoned and other.beside("attack") == rest]
    same = ("model", "data", "method", "defense")
    return next((other for other in clean if alike(group, other, same)), None)


def tunings(groups: Sequence[Group]) -> list[tuple[Group, Group, list[str]]]:
    """Each unpoisoned tuned group with its untuned base, and up to two metrics both have."""
    found, telling = [], picked(groups, "tuning")
    for tuned in [group for group in groups if group.method != "none" and not group.poisoned]:
        base = _untuned(tuned, groups)
        metrics = [metric for metric in headlines(groups) if tuned.get(metric)]
        shared = [metric for metric in metrics if base and base.get(metric)]
        shared.sort(key=lambda metric: metric not in telling)
        if base and shared:
            found.append((base, tuned, shared[:2]))
    return found


def _untuned(tuned: Group, groups: Sequence[Group]) -> Group | None:
    """The base of this group: of several the one asked in the same way."""
    found = [g for g in groups if g.method == "none" and alike(g, tuned, ("model", "data"))]
    same = [g for g in found if _asked(g) == _asked(tuned)]
    return next(iter(same if len(found) > 1 else found), None)


def _asked(group: Group) -> dict[str, Any]:
    """The axes that an untuned model depends on."""
    parts = ("data", "model", "template", "align", "evaluation")
    return {key: value for key, value in group.axes.items() if key.startswith(parts)}


def gains(metric: str, base: Group, tuned: Group) -> dict[str, Gap]:
    """The gain by part of the metric (a language, say), least first; intervals hold for all."""
    parts = [
        s for s in tuned.stats.values() if s.part and s.name == metric and s.role == "headline"
    ]
    gaps = {s.part: difference(base, tuned, s.metric, len(parts)) for s in parts}
    found = {text.line(part): gap for part, gap in gaps.items() if gap is not None}
    return dict(sorted(found.items(), key=lambda item: item[1].difference))


def moved(metric: str, base: Group, tuned: Group) -> str:
    """`lifts accuracy from 35.0 % to 82.0 % (+47.0 points [42.8, 51.2])`; of one seed only that it
    goes from there to there in this model."""
    a, b, gap = base.get(metric), tuned.get(metric), difference(base, tuned, metric)
    assert a is not None and b is not None and gap is not None
    title, before, after = a.title, a.number(), b.number()
    if gap.is_known and not gap.is_clear:
        return f"does not clearly change {title}: {before} to {after} ({gap.said})"
    verb = "takes"
    if gap.is_clear:
        verb = "lifts" if gap.difference > 0 else "lowers"
    only = f" {THIS_MODEL}" if gap.scope == "model" else ""
    return f"{verb} {title} from {before} to {after}{only} ({gap.said})"


def told_apart(least: Group, most: Group, metric: str, groups: int) -> str:
    """What has to be added where the ends of so many groups stand beside each other."""
    gap = difference(least, most, metric, groups * (groups - 1) // 2)
    if gap is None or gap.is_clear:
        return ""
    if gap.is_known:
        return "; the intervals do not tell them apart"
    return "; one seed does not tell them apart" if gap.scope == "model" else ""


def dose(group: Group, where: str = "") -> str:
    """`5 % poisoned rows (100 of 2,000; lora)`."""
    inside = "; ".join(filter(None, (poisoned_of(group), where)))
    return f"{text.share(group.rate)} poisoned rows" + (f" ({inside})" if inside else "")


def poisoned_of(group: Group) -> str:
    """`100 of 2,000` training rows; empty where that was not kept."""
    poison = next((cell.poison for cell in group.done if cell.poison), None)
    if poison is None or poison.rows is None or poison.poisoned_rows is None:
        return ""
    return f"{poison.poisoned_rows:,} of {poison.rows:,}"


def alike(a: Group, b: Group, knobs: Sequence[str]) -> bool:
    """Whether two groups agree on these knobs."""
    return all(getattr(a, knob) == getattr(b, knob) for knob in knobs)
