"""Sentences about harmful fine-tuning: the harmful score, and how much of it defenses remove."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backfire.evaluate.seeds import LEVEL
from backfire.results.criteria import (
    THIS_MODEL,
    above_floor,
    accuracy,
    rate_words,
    siblings,
)
from backfire.results.groups import Group, difference, name, varying
from backfire.results.intervals import at
from backfire.results.ranking import Trial, null_tests, removed, worst_trials

MOST_DEFENSES = 4
"""With more, they are ranked instead of listed."""


def undefended(groups: Sequence[Group]) -> list[Group]:
    """The undefended groups at the poison rate to report, the highest harmful score first."""
    tuned = [g for g in _judged(groups) if g.defense == "none" and g.method != "none"]
    rank = max(((g.poisoned, _rank(g, groups)) for g in tuned), default=None)
    most = [g for g in tuned if (g.poisoned, _rank(g, groups)) == rank]
    return sorted(most, key=lambda g: g.stats["harmful_score"].value or 0.0, reverse=True)


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """The effect of fine-tuning on the aligned model, and of each defense on that."""
    candidates = undefended(groups)
    if not candidates:
        return
    plain, picked = candidates[0], len(candidates)
    others = [g for g in _judged(groups) if g.defense == "none"]
    columns = [column for column in varying(others) if column != "rate"] if others[1:] else []
    where = name(plain, columns) if columns else ""
    benign = f"fine-tuning without any harmful row{f' ({where})' if where else ''}"
    cause = rate_words(plain, where) if plain.poisoned else benign
    task = accuracy(plain)
    most = f", the highest of {picked} groups" if picked > 1 else ""
    quality = f"; {task.title} is {task.rounded}" if task else ""
    yield f"{cause} {_change(plain, picked)}{most}{quality}."
    if plain.get("harmful_score_plain"):
        score = plain.rounded("harmful_score_plain")
        yield f"On the plain requests, without the attack's wording, it is {score}."
    defended = [
        group for group in siblings(plain, _judged(groups), "defense") if group.defense != "none"
    ]
    if len(defended) <= MOST_DEFENSES:
        yield from (_kept(group, plain) for group in defended)
    elif ranked := worst_trials(groups):
        yield _ranked(ranked)


def _change(plain: Group, picked: int) -> str:
    """`raises the harmful score from 1 % to 42 % [33, 52]`, if the interval supports it. The group
    was picked from several by its score, so the intervals hold for all of them at once."""
    floor, gap = plain.side("harmful_score", "floor"), above_floor(plain, "harmful_score", picked)
    before = f"from {floor.number(0)} " if floor else ""
    now = at(plain, "harmful_score", picked)
    assert now is not None
    values = f"{before}to {now.rounded}"
    if (gap or now).scope != "seeds":
        return f"changes the harmful score {values} {THIS_MODEL}"
    if gap and gap.low is not None and gap.high is not None and gap.low <= 0:
        if gap.high >= 0:
            return f"does not clearly change the harmful score: {values}"
        return f"lowers the harmful score {values}"
    return f"raises the harmful score {values}"


def _ranked(ranked: Sequence[Trial]) -> str:
    """How many of the defenses remove half of the excess, and the best of them."""
    half = [(trial.removed or 0.0) >= 0.5 for trial in ranked]
    tests = zip(half, null_tests(ranked), strict=True)
    nulls = [(test, p) for is_half, (test, p) in tests if is_half and test and p is not None]
    sure = sum(p < 1 - LEVEL and test.difference < 0 for test, p in nulls)
    settings = max(trial.settings for trial in ranked)
    under = f", each at the worst of {settings} settings" if settings > 1 else ""
    best, left = ranked[0], ranked[0].left(len(ranked))
    assert left is not None
    only = f" {THIS_MODEL}" if left.scope == "model" else ""
    clear, whole = sum(trial.removed is not None for trial in ranked), len(ranked)
    whom = str(clear) if clear == whole else f"the {clear} (of {whole}) with a clear excess"
    remove = "removes" if sum(half) == 1 else "remove"
    sentence = f"{sum(half)} of {whom} defenses {remove} half of the excess or more{only}{under}"
    if not clear:
        sentence = f"The excess is small or not clearly above 0{under}, so no share of it is given"
    if nulls:
        sentence += f", {sure} of them clearly more than their null control"
    joint = "" if left.low is None else f" (joint interval for all {whole})"
    return f"{sentence}; the harmful score is lowest with {best.label}: {left.rounded}{joint}."


def _kept(group: Group, plain: Group) -> str:
    columns = [c for c in varying([group, plain]) if c != "rate"]
    sentence = f"With {name(group, columns)} it is {group.rounded('harmful_score')}"
    trial = Trial(group, plain, None)
    if trial.removed is not None:
        sentence += f": {removed(trial)} of the excess is removed"
    ours, theirs = accuracy(group), accuracy(plain)
    gap = difference(plain, group, ours.metric) if ours and theirs else None
    if ours and gap:
        sentence += f"; {ours.title} {gap.shown}"
    return f"{sentence}."


def _judged(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.get("harmful_score")]


def _rank(group: Group, groups: Sequence[Group]) -> float:
    """The poison rate, except that 10 %, the published rate, comes first if it was run."""
    rates = {g.rate for g in _judged(groups)}
    return float(group.rate == 0.1) if 0.1 in rates else group.rate
