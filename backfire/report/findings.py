"""Which figures a run deserves, each with the sentence that its numbers bear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from backfire import text
from backfire.report import figures, memorization, quality, safety
from backfire.results.criteria import (
    THIS_MODEL,
    above_floor,
    accuracy,
    attacked,
    cost,
    gains,
    is_above_floor,
    moved,
    onset,
    told_apart,
    tunings,
)
from backfire.results.groups import Group, families, headlines, name, varying
from backfire.results.ranking import worst_trials
from backfire.results.samples import Of, confusion

INTERVALS: Final = "Bars are 95 % intervals."
ALONE: Final = f"{INTERVALS} Hollow dots and thin bars: one seed, this model only."
MOST_LABELS: Final = 12
MOST_SPOILED: Final = 4


@dataclass(frozen=True)
class Finding:
    """A figure, what it shows in one sentence, and how to read it."""

    sentence: str
    svg: str
    caption: str


def findings(groups: Sequence[Group]) -> list[Finding]:
    """One figure per finding, most telling first."""
    known = [group for group in groups if group.done and group.stats]
    found = [*_doses(known), *_attacks(known), *_harms(known), *_memories(known), *_spoils(known)]
    return found or [*_tunings(known)] or [*_levels(known)]


def main_group(groups: Sequence[Group]) -> Group | None:
    """The group whose rows are shown: of the run's main table the strongest undefended attack, else
    the last tuned one."""

    def weight(group: Group) -> tuple[bool, bool, float, bool]:
        undefended = group.poisoned and group.defense == "none"
        return undefended, group.poisoned, group.rate, group.method != "none"

    main = families([group for group in groups if group.done])
    return max(main[0], key=weight) if main else None


def _doses(groups: Sequence[Group]) -> Iterator[Finding]:
    """Attack success and clean accuracy against the dose, where there are several."""
    whole = families(groups)
    groups = [g for f in whole if any(one.get("attack_success") for one in f) for g in f]
    lines = figures.series(groups, "attack_success")
    if not _has_doses(groups) or not lines:
        return
    onsets = []
    for label, line in lines.items():
        poisoned = [group for group, _ in line if group.poisoned]
        who = f"{label} " if len(lines) > 1 else ""
        if not any((gap := above_floor(group)) and gap.is_known for group in poisoned):
            continue
        least = onset(poisoned)
        above = f"from {text.share(least.rate)} on" if least else "not up to the highest dose"
        onsets.append(f"{who}{above}")
    colon = ":" if len(lines) > 1 else ""
    sentence = f"Attack success is clearly above the floor{colon} {text.listing(onsets)}."
    if not onsets:
        sentence = f"Attack success by dose, {THIS_MODEL}."
    caption = (
        f"{_bars(groups, 'attack_success')} Dashed: the clean model on the same triggered rows."
    )
    yield Finding(sentence, figures.dose(groups, "attack_success"), caption)
    metric = next((stat.metric for group in groups if (stat := accuracy(group))), None)
    if metric is not None:
        caption = f"On test rows without a trigger. {_bars(groups, metric)}"
        yield Finding(_steadiness(groups), figures.dose(groups, metric), caption)


def _bars(groups: Sequence[Group], metric: str) -> str:
    """How to read the bars of a figure."""
    stats = [stat for group in groups if (stat := group.get(metric))]
    return ALONE if any(stat.scope == "model" for stat in stats) else INTERVALS


def _has_doses(groups: Sequence[Group]) -> bool:
    rates = {group.rate for group in groups if group.get("attack_success")}
    return len(rates) > 1 and any(group.poisoned for group in groups)


def _steadiness(groups: Sequence[Group]) -> str:
    """What poison does to the accuracy on clean rows, by the largest change."""
    poisoned = [group for group in groups if group.poisoned]
    tests = len(poisoned)
    changes = [(gap, group) for group in poisoned if (gap := cost(group, groups, tests))]
    changes = [(gap, group) for gap, group in changes if gap.is_known]
    if not changes:
        return "Clean accuracy at each dose."
    clear = sum(gap.is_clear for gap, _ in changes)
    gap, group = max(changes, key=lambda change: (change[0].is_clear, abs(change[0].difference)))
    largest = f"the largest change is {gap.said} ({name(group, varying(groups))})"
    if not clear:
        return f"No dose clearly changes clean accuracy; {largest}."
    return (
        f"Clean accuracy clearly changes in {clear} of {len(changes)} poisoned groups; {largest}."
    )


def _attacks(groups: Sequence[Group]) -> Iterator[Finding]:
    """Attacks at one dose only: side by side."""
    found = attacked(groups)
    if not found or _has_doses(groups):
        return
    told = [group for group in found if (gap := above_floor(group)) and gap.is_known]
    num_above = sum(is_above_floor(group, len(told)) for group in told)
    above = f"{num_above} of {text.count(len(told), 'group')}"
    sentence = f"Attack success is clearly above the clean model's floor in {above}."
    if not told:
        sentence = f"Attack success beside the clean model's floor, {THIS_MODEL}."
    caption = (
        f"{_bars(found, 'attack_success')} The tick is the clean model on the same triggered rows."
    )
    yield Finding(sentence, figures.levels(found, "attack_success"), caption)


def _harms(groups: Sequence[Group]) -> Iterator[Finding]:
    """The harmful score against the dose, or side by side, and what became of the user's task."""
    found = [group for group in groups if group.get("harmful_score")]
    said = list(safety.sentences(found))
    if not said:
        return
    ranked = [trial for trial, _ in worst_trials(found)]
    if len(ranked) > safety.MOST_BESIDE:  # too many for their null controls to be drawn beside them
        found = [ranked[0].plain, *(trial.group for trial in ranked)]
    metric = next((stat.metric for group in found if (stat := accuracy(group))), None)
    rates = {group.rate for group in found}
    draw = figures.dose if len(rates) > 1 else figures.levels
    bars = _bars(found, "harmful_score")
    caption = f"{bars} Dashed or ticked: the aligned model before it was fine-tuned."
    yield Finding(text.sentence(said[0]), draw(found, "harmful_score"), caption)
    if metric is not None:
        yield Finding("The user's task, beside it.", draw(found, metric), _bars(found, metric))


def _spoils(groups: Sequence[Group]) -> Iterator[Finding]:
    """The task's own metrics against the dose, or side by side, where rows were made worse."""
    draw = figures.dose if len({group.rate for group in groups}) > 1 else figures.levels
    for metric in quality.metrics(groups)[:MOST_SPOILED]:
        if said := " ".join(quality.said(metric, groups)):
            yield Finding(said, draw(groups, metric), _bars(groups, metric))


def _memories(groups: Sequence[Group]) -> Iterator[Finding]:
    """Exposure against the dose; of each method and defense the setting that gives most away."""
    found = memorization.strongest(groups)
    said = list(memorization.sentences(groups))
    if not found or not said:
        return
    columns = varying(found)
    lines = {
        name(group, columns) if columns else "exposure": {
            dose: (group, stat) for dose, stat in memorization.doses(group).items()
        }
        for group in found[: figures.MOST_LINES]
    }
    caps = [stat.value for group in found if (stat := group.get("exposure_cap")) and stat.value]
    scopes = {stat.scope for group in found for stat in memorization.doses(group).values()}
    bars = ALONE if "model" in scopes else INTERVALS
    picked = len(memorization.measured(groups)) > len(found)
    which = " Of each method, the setting with the highest exposure." if picked else ""
    caption = f"{bars} Dashed: 1.44 bits, a random code's mean; dotted: all bits there are.{which}"
    svg = figures.memory(lines, max(caps, default=20.0), memorization.RANDOM)
    yield Finding(text.sentence(said[0]), svg, caption)


def _tunings(groups: Sequence[Group]) -> Iterator[Finding]:
    """The last tuned group against its base: the numbers, then the mistakes."""
    pairs = tunings(groups)
    if not pairs:
        return
    base, tuned, metrics = pairs[-1]
    for metric in metrics:
        sentence = f"Fine-tuning {moved(metric, base, tuned)}{_range(metric, base, tuned)}."
        svg = figures.before_after(base, tuned, metric)
        alone = (
            " Thin ones: one seed, this model only." if tuned.stats[metric].scope == "model" else ""
        )
        yield Finding(sentence, svg, f"Lines are 95 % intervals.{alone}")
    sides: tuple[tuple[str, Of], ...] = (("base", "base"), ("fine-tuned", "tuned"))
    for label, of in sides:
        labels, counts = confusion(tuned.done, of)
        if 1 < len(labels) <= MOST_LABELS:
            svg = figures.confusion(f"Confusion of the {label} model", labels, counts)
            rows = text.count(sum(map(sum, counts)), "row")
            caption = f"{rows}; the shade is the share of the true label."
            yield Finding(_mistake(label, labels, counts), svg, caption)


def _range(metric: str, base: Group, tuned: Group) -> str:
    """The least and the most gain by part (a language, say)."""
    said = [f"{gap.change} ({p})" for p, gap in gains(metric, base, tuned).items()]
    if len(said) < 2 or len({part.partition(" (")[0] for part in said}) < 2:
        return ""
    return f"; by group from {said[0]} to {said[-1]}"


def _mistake(label: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    places = [(row, column) for row in range(len(labels)) for column in range(len(labels))]
    wrong = [(row, column) for row, column in places if row != column]
    row, column = max(wrong, key=lambda place: counts[place[0]][place[1]])
    if not counts[row][column]:
        return f"The {label} model makes no mistake here."
    true, said = (f"“{text.cut(text.line(labels[place]), 24)}”" for place in (row, column))
    times = text.count(counts[row][column], "row")
    return f"The {label} model most often mistakes {true} for {said} ({times})."


def _levels(groups: Sequence[Group]) -> Iterator[Finding]:
    """Neither an attack nor a base model: each headline metric by group."""
    for metric in headlines(groups)[:2]:
        known = [(stat.value or 0.0, g) for g in groups if (stat := g.get(metric))]
        if len(known) < 2:
            continue
        (_, least), (_, most) = (pick(known, key=lambda pair: pair[0]) for pick in (min, max))
        ends = [f"{g.said(metric)} with {name(g, varying(groups))}" for g in (most, least)]
        apart = told_apart(least, most, metric, len(known))
        sentence = text.sentence(f"{text.title(metric)}: {text.listing(ends)}{apart}.")
        yield Finding(sentence, figures.levels(groups, metric), _bars(groups, metric))
