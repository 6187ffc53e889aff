"""The figures of a report, each with the sentence that its numbers support."""

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
    change_words,
    cost,
    extremes,
    gains,
    is_above_floor,
    onset,
    tie_note,
    tunings,
)
from backfire.results.groups import Group, families, headlines, name, varying
from backfire.results.ranking import worst_trials
from backfire.results.samples import Of, confusion

INTERVALS: Final = "Bars are 95 % intervals."
ONE_SEED: Final = f"{INTERVALS} Hollow dots and thin bars: one seed, this model only."
CLEAN_MODEL: Final = "clean model on the same triggered rows"
MOST_LABELS: Final = 12
MOST_QUALITIES: Final = 4


@dataclass(frozen=True)
class Finding:
    """A figure, what it shows in one sentence, and how to read it."""

    sentence: str
    svg: str
    caption: str


def findings(groups: Sequence[Group]) -> list[Finding]:
    """One figure per finding, the most important first."""
    done = [group for group in groups if group.done and group.stats]
    attacks = [*_rates(done), *_attacks(done), *_harms(done), *_memories(done), *_qualities(done)]
    return attacks or [*_tunings(done)] or [*_levels(done)]


def main_group(groups: Sequence[Group]) -> Group | None:
    """The group whose rows are shown: in the run's main table the undefended attack with the
    highest poison rate, else the last tuned group."""

    def weight(group: Group) -> tuple[bool, bool, float, bool]:
        undefended = group.poisoned and group.defense == "none"
        return undefended, group.poisoned, group.rate, group.method != "none"

    main = families([group for group in groups if group.done])
    return max(main[0], key=weight) if main else None


def _rates(groups: Sequence[Group]) -> Iterator[Finding]:
    """Attack success and clean accuracy against the poison rate, if there are several."""
    groups = [g for f in families(groups) if any(one.get("attack_success") for one in f) for g in f]
    lines = figures.series(groups, "attack_success")
    if not _has_rates(groups) or not lines:
        return
    onsets = []
    for label, line in lines.items():
        poisoned = [group for group, _ in line if group.poisoned]
        who = f"{label} " if len(lines) > 1 else ""
        if not any((gap := above_floor(group)) and gap.covers_seeds for group in poisoned):
            continue
        least = onset(poisoned)
        above = f"from {text.share(least.rate)} on" if least else "at no tested rate"
        onsets.append(f"{who}{above}")
    colon = ":" if len(lines) > 1 else ""
    sentence = f"Attack success is clearly above the baseline{colon} {text.listing(onsets)}."
    if not onsets:
        sentence = f"Attack success by poison rate, {THIS_MODEL}."
    caption = f"{_bars(groups, 'attack_success')} Dashed: {CLEAN_MODEL}."
    yield Finding(sentence, figures.by_rate(groups, "attack_success"), caption)
    metric = next((stat.metric for group in groups if (stat := accuracy(group))), None)
    if metric is not None:
        caption = f"On test rows without a trigger. {_bars(groups, metric)}"
        yield Finding(_accuracy_change(groups), figures.by_rate(groups, metric), caption)


def _bars(groups: Sequence[Group], metric: str) -> str:
    """How to read the bars of a figure."""
    stats = [stat for group in groups if (stat := group.get(metric))]
    return ONE_SEED if any(stat.scope == "model" for stat in stats) else INTERVALS


def _has_rates(groups: Sequence[Group]) -> bool:
    rates = {group.rate for group in groups if group.get("attack_success")}
    return len(rates) > 1 and any(group.poisoned for group in groups)


def _accuracy_change(groups: Sequence[Group]) -> str:
    """The largest change of accuracy on clean rows due to the poison."""
    poisoned = [group for group in groups if group.poisoned]
    tests = len(poisoned)
    changes = [(gap, group) for group in poisoned if (gap := cost(group, groups, tests))]
    changes = [(gap, group) for gap, group in changes if gap.covers_seeds]
    if not changes:
        return "Clean accuracy by poison rate."
    clear = sum(gap.is_clear for gap, _ in changes)
    gap, group = max(changes, key=lambda change: (change[0].is_clear, abs(change[0].difference)))
    largest = f"the largest change is {gap.shown} ({name(group, varying(groups))})"
    at_once = f" This interval holds for all {tests} groups at once." if tests > 1 else ""
    if not clear:
        return f"No poison rate clearly changes clean accuracy; {largest}.{at_once}"
    some = f"{clear} of {len(changes)} poisoned groups"
    return f"Clean accuracy clearly changes in {some}; {largest}.{at_once}"


def _attacks(groups: Sequence[Group]) -> Iterator[Finding]:
    """Attacks at a single poison rate, side by side."""
    attacks = attacked(groups)
    if not attacks or _has_rates(groups):
        return
    tested = [group for group in attacks if (gap := above_floor(group)) and gap.covers_seeds]
    num_above = sum(is_above_floor(group, len(tested)) for group in tested)
    above = f"{num_above} of {text.count(len(tested), 'group')}"
    sentence = f"Attack success is clearly above the clean-model baseline in {above}."
    if not tested:
        sentence = f"Attack success and the clean-model baseline, {THIS_MODEL}."
    caption = f"{_bars(attacks, 'attack_success')} Tick: {CLEAN_MODEL}."
    yield Finding(sentence, figures.levels(attacks, "attack_success"), caption)


def _harms(groups: Sequence[Group]) -> Iterator[Finding]:
    """The harmful score by poison rate, or side by side, and the accuracy on the user's task."""
    judged = [group for group in groups if group.get("harmful_score")]
    sentence = next(safety.sentences(judged), None)
    if not sentence:
        return
    ranked = worst_trials(judged)
    if len(ranked) > safety.MOST_DEFENSES:  # too many to draw their null controls as well
        judged = [ranked[0].plain, *(trial.group for trial in ranked)]
    metric = next((stat.metric for group in judged if (stat := accuracy(group))), None)
    rates = {group.rate for group in judged}
    draw = figures.by_rate if len(rates) > 1 else figures.levels
    mark = "Dashed" if len(rates) > 1 else "Tick"
    bars = _bars(judged, "harmful_score")
    caption = f"{bars} {mark}: aligned model before fine-tuning."
    yield Finding(text.sentence(sentence), draw(judged, "harmful_score"), caption)
    if metric is not None:
        sentence = "Accuracy of the same models on the user's task."
        yield Finding(sentence, draw(judged, metric), _bars(judged, metric))


def _qualities(groups: Sequence[Group]) -> Iterator[Finding]:
    """The task's metrics by poison rate, or side by side, for rows of bad quality."""
    draw = figures.by_rate if len({group.rate for group in groups}) > 1 else figures.levels
    for metric in quality.metrics(groups)[:MOST_QUALITIES]:
        if sentences := " ".join(quality.metric_sentences(metric, groups)):
            yield Finding(sentences, draw(groups, metric), _bars(groups, metric))


def _memories(groups: Sequence[Group]) -> Iterator[Finding]:
    """Exposure by number of repeats; for each method and defense the setting that reveals most."""
    shown = memorization.strongest(groups)
    if not shown:
        return
    columns = varying(shown)
    lines = {
        name(group, columns) if columns else "exposure": {
            repeats: (group, stat) for repeats, stat in memorization.exposures(group).items()
        }
        for group in shown[: figures.MOST_LINES]
    }
    caps = [stat.value for group in shown if (stat := group.get("exposure_cap")) and stat.value]
    scopes = {stat.scope for group in shown for stat in memorization.exposures(group).values()}
    bars = ONE_SEED if "model" in scopes else INTERVALS
    is_picked = len(memorization.measured(groups)) > len(shown)
    which = " Of each method, the setting with the highest exposure." if is_picked else ""
    caption = f"{bars} Dashed: 1.44 bits, the mean of a random code; dotted: the maximum.{which}"
    svg = figures.memory(lines, max(caps, default=20.0), memorization.RANDOM)
    yield Finding(text.sentence(next(memorization.sentences(groups))), svg, caption)


def _tunings(groups: Sequence[Group]) -> Iterator[Finding]:
    """The last tuned group against its base: metrics, then confusion matrices."""
    pairs = tunings(groups)
    if not pairs:
        return
    base, tuned, metrics = pairs[-1]
    for metric in metrics:
        sentence = f"Fine-tuning {change_words(metric, base, tuned)}{_range(metric, base, tuned)}."
        svg = figures.before_after(base, tuned, metric)
        is_one = tuned.stats[metric].scope == "model"
        thin = " Thin lines: one seed, this model only." if is_one else ""
        yield Finding(sentence, svg, f"Lines are 95 % intervals.{thin}")
    sides: tuple[tuple[str, Of], ...] = (("base", "base"), ("fine-tuned", "tuned"))
    for label, of in sides:
        labels, counts = confusion(tuned.done, of)
        if 1 < len(labels) <= MOST_LABELS:
            svg = figures.confusion(f"Confusion of the {label} model", labels, counts)
            rows = text.count(sum(map(sum, counts)), "row")
            caption = f"{rows}; shade: share of the rows with that true label."
            yield Finding(_most_frequent_error(label, labels, counts), svg, caption)


def _range(metric: str, base: Group, tuned: Group) -> str:
    """The smallest and largest gain by part (such as a language)."""
    words = [f"{gap.change} ({p})" for p, gap in gains(metric, base, tuned).items()]
    if len(words) < 2 or len({part.partition(" (")[0] for part in words}) < 2:
        return ""
    return f"; by group from {words[0]} to {words[-1]}"


def _most_frequent_error(label: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    places = [(row, column) for row in range(len(labels)) for column in range(len(labels))]
    wrong = [(row, column) for row, column in places if row != column]
    row, column = max(wrong, key=lambda place: counts[place[0]][place[1]])
    if not counts[row][column]:
        return f"The {label} model makes no error on these rows."
    true, predicted = (f"“{text.cut(text.line(labels[place]), 24)}”" for place in (row, column))
    times = text.count(counts[row][column], "row")
    return f"The {label} model most often predicts {predicted} for {true} ({times})."


def _levels(groups: Sequence[Group]) -> Iterator[Finding]:
    """Without an attack or a base model: each headline metric by group."""
    for metric in headlines(groups)[:2]:
        if not (ends_of := extremes(groups, metric)) or ends_of[2] < 2:
            continue
        least, most, number = ends_of
        ends = [f"{g.rounded(metric)} with {name(g, varying(groups))}" for g in (most, least)]
        tie = tie_note(least, most, metric, number)
        sentence = text.sentence(f"{text.title(metric)}: {text.listing(ends)}{tie}.")
        yield Finding(sentence, figures.levels(groups, metric), _bars(groups, metric))
