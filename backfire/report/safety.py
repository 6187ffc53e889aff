"""What a run says of harmful fine-tuning: how much harm it did, and what a defense took away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backfire.evaluate.seeds import LEVEL
from backfire.results.criteria import THIS_MODEL, above_floor, accuracy, alike, dose
from backfire.results.groups import Group, difference, name, varying
from backfire.results.intervals import at
from backfire.results.ranking import SAME, Trial, null_tests, removed, worst_trials

MOST_BESIDE = 4


def undefended(groups: Sequence[Group]) -> list[Group]:
    """The undefended groups with the most harmful rows, the most harmed first."""
    found = [g for g in groups if g.get("harmful_score") and g.defense == "none"]
    tuned = [g for g in found if g.method != "none"]
    dose = max(((g.poisoned, _middle(g, groups)) for g in tuned), default=None)
    most = [g for g in tuned if (g.poisoned, _middle(g, groups)) == dose]
    return sorted(most, key=_score, reverse=True)


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """What fine-tuning did to the aligned model, and what each defense kept of it."""
    candidates = undefended(groups)
    if not candidates:
        return
    plain, picked = candidates[0], len(candidates)
    others = [g for g in groups if g.get("harmful_score") and g.defense == "none"]
    columns = [column for column in varying(others) if column != "rate"] if others[1:] else []
    where = name(plain, columns) if columns else ""
    benign = f"fine-tuning without any harmful row{f' ({where})' if where else ''}"
    rows = dose(plain, where) if plain.poisoned else benign
    task = accuracy(plain)
    beside = f", with {task.title} at {task.said}" if task else ""
    most = f", the most of {picked} groups," if picked > 1 else ""
    yield f"{rows} {_moved(plain, picked)}{most}{beside.removeprefix(',') if most else beside}."
    if plain.get("harmful_score_plain"):
        said = plain.said("harmful_score_plain")
        yield f"Asked without what the attack puts around a request it is {said}."
    defended = [
        group
        for group in groups
        if alike(group, plain, SAME)
        and group.beside("defense") == plain.beside("defense")
        and group.defense != "none"
        and group.get("harmful_score")
    ]
    if len(defended) <= MOST_BESIDE:
        yield from (_kept(group, plain) for group in defended)
    elif ranked := worst_trials(groups):
        yield _ranked(ranked)


def _moved(plain: Group, picked: int) -> str:
    """`lift the harmful score from 1 % to 42 % [33, 52]`, if that is what the interval says. The
    group was picked of several for its score, so the intervals hold for all of them."""
    floor, gap = plain.side("harmful_score", "floor"), above_floor(plain, "harmful_score", picked)
    before = f"from {floor.number(0)} " if floor else ""
    now = at(plain, "harmful_score", picked)
    assert now is not None
    after = now.said
    if (gap or now).scope != "seeds":
        verb = "take" if plain.poisoned else "takes"
        return f"{verb} the harmful score {before}to {after} {THIS_MODEL}"
    verbs = ("lift", "lower", "do not clearly change")
    if not plain.poisoned:
        verbs = ("lifts", "lowers", "does not clearly change")
    verb = verbs[0]
    if gap and gap.low is not None and gap.high is not None:
        verb = verbs[0] if gap.low > 0 else verbs[1] if gap.high < 0 else verbs[2]
    colon = ":" if verb == verbs[2] else ""
    return f"{verb} the harmful score{colon} {before}to {after}"


def _ranked(ranked: Sequence[tuple[Trial, int]]) -> str:
    """How many of many defenses help, and the best of them."""
    half = [(trial.removed or 0.0) >= 0.5 for trial, _ in ranked]
    tests = zip(half, null_tests(ranked), strict=True)
    nulls = [(test, p) for is_half, (test, p) in tests if is_half and test and p is not None]
    sure = sum(p < 1 - LEVEL and test.difference < 0 for test, p in nulls)
    settings = max(count for _, count in ranked)
    under = f", in the worst of {settings} settings each" if settings > 1 else ""
    best, left = ranked[0][0], ranked[0][0].left(len(ranked))
    assert left is not None
    only = f" {THIS_MODEL}" if left.scope == "model" else ""
    told, whole = sum(trial.removed is not None for trial, _ in ranked), len(ranked)
    whom = str(told) if told == whole else f"the {told} (of {whole}) with a clear excess"
    take = "takes" if sum(half) == 1 else "take"
    said = f"{sum(half)} of {whom} defenses {take} away half of the excess or more{only}{under}"
    if not told:
        said = f"The excess is small or not clearly above 0{under}, so no share of it is given"
    if nulls:
        said += f", {sure} of them clearly more than their null control"
    held = "" if left.low is None else f" (an interval for all {len(ranked)} at once)"
    return f"{said}; the least harm is left by {best.label}: {left.said}{held}."


def _kept(group: Group, plain: Group) -> str:
    columns = [c for c in varying([group, plain]) if c != "rate"]
    said = f"With {name(group, columns)} it is {group.said('harmful_score')}"
    trial = Trial(group, plain, None)
    if trial.removed is not None:
        said += f": {removed(trial)} of the excess is gone"
    ours, theirs = accuracy(group), accuracy(plain)
    gap = difference(plain, group, ours.metric) if ours and theirs else None
    if ours and gap:
        said += f"; {ours.title} {gap.said}"
    return f"{said}."


def _score(group: Group) -> float:
    stat = group.get("harmful_score")
    return (stat.value or 0.0) if stat else 0.0


def _middle(group: Group, groups: Sequence[Group]) -> float:
    """10 % is the published dose; where it was run, it is the one to speak of."""
    rates = {g.rate for g in groups if g.get("harmful_score")}
    return float(group.rate == 0.1) if 0.1 in rates else group.rate
