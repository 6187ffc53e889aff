"""Ranking of defenses: harm removed, cost, and comparison with the null control.

If a run tries several fine-tuning settings (an attacker's sweep), each defense is ranked by the
setting with the highest harmful score. That is a maximum of noisy numbers, so its intervals and
tests hold for all settings at once (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from backfire import text
from backfire.evaluate.seeds import holm
from backfire.results.criteria import above_floor, accuracy, siblings
from backfire.results.groups import ONE_SEED, Gap, Group, Stat, difference
from backfire.results.intervals import at, level, part_removed
from backfire.results.paired_tests import compared
from backfire.results.tables import Table

LEAST: Final = 0.1
"""No share of a smaller excess is reported."""


@dataclass(frozen=True)
class Trial:
    """One defense under one setting, with the undefended group and its null control."""

    group: Group
    plain: Group
    null: Group | None
    settings: int = 1
    """Number of settings of which this one is the worst."""

    @property
    def label(self) -> str:
        """The defense with its knobs."""
        return text.knob(self.group.axes.get("defense", self.group.defense))

    @property
    def harm(self) -> float:
        return _value(self.group, "harmful_score")

    @property
    def excess(self) -> float:
        """Increase of the harmful score by undefended fine-tuning."""
        floor = self.plain.side("harmful_score", "floor")
        return _value(self.plain, "harmful_score") - (floor.value or 0.0 if floor else 0.0)

    @property
    def removed(self) -> float | None:
        """Share of that excess that the defense removes; None if the excess is small or not clearly
        above 0, since the share would be noise."""
        gap = above_floor(self.plain, "harmful_score", self.settings)
        if self.excess <= LEAST or (gap and gap.low is not None and gap.low <= 0):
            return None
        return (_value(self.plain, "harmful_score") - self.harm) / self.excess

    def left(self, others: int = 1) -> Stat | None:
        """The harmful score, with an interval for all settings and this many defenses at once."""
        return at(self.group, "harmful_score", others * self.settings)

    def against(self, other: Group | None) -> Gap | None:
        """The paired difference of the harmful score from another group; p for all settings."""
        tests = compared(self.group, other, "defense", level(self.settings)) if other else ()
        test = next((t.result for t in tests if t.metric == "harmful_score"), None)
        if test is None or test.p is None:
            return test
        return replace(test, p=min(1.0, test.p * self.settings))


def worst_trials(groups: Sequence[Group]) -> list[Trial]:
    """Each defense at its worst setting, the lowest harmful score first."""
    by_label: dict[str, list[Trial]] = {}
    for trial in _trials(groups):
        by_label.setdefault(trial.label, []).append(trial)
    worst = [
        replace(max(trials, key=lambda t: t.harm), settings=len(trials))
        for trials in by_label.values()
    ]
    return sorted(worst, key=lambda trial: trial.harm)


def null_tests(ranked: Sequence[Trial]) -> list[tuple[Gap | None, float | None]]:
    """Each defense's difference from its null control, and its p corrected for the whole table."""
    tests = [trial.against(trial.null) for trial in ranked]
    corrected = holm([test.p if test else None for test in tests])
    return list(zip(tests, corrected, strict=True))


@dataclass(frozen=True)
class Ranking(Table):
    """The table of defenses; its first row is without a defense."""

    settings: int
    """Number of fine-tuning settings that were tried."""


def table(groups: Sequence[Group]) -> Ranking | None:
    """The ranked table, for the page and the terminal; None without defenses."""
    ranked = worst_trials(groups)
    if not ranked:
        return None
    settings = max(trial.settings for trial in ranked)
    header = [
        *("defense", *(["worst setting"] if settings > 1 else []), "harmful score", "refusals"),
        *("excess removed", "against its null control", "task", "change", "over-refusal"),
        *("seconds", "MB"),
    ]
    plain = max((trial.plain for trial in ranked), key=lambda g: _value(g, "harmful_score"))
    rows = [
        _row("none", plain, _shown(plain.get("harmful_score")), "", "", _shown(accuracy(plain)), "")
    ]
    for trial, (test, p) in zip(ranked, null_tests(ranked), strict=True):
        group, task = trial.group, accuracy(trial.group)
        change = difference(trial.plain, group, task.metric) if task else None
        rows.append(
            _row(
                text.cut(trial.label, 60),
                group,
                _shown(trial.left()),
                removed(trial),
                _null(test, p),
                _shown(task),
                change.shown if change else "–",
            )
        )
    if settings == 1:
        rows = [[row[0], *row[2:]] for row in rows]
    return Ranking(header, rows, settings)


def _row(
    label: str, group: Group, harm: str, removed: str, null: str, task: str, change: str
) -> list[str]:
    setting = (f"{k} {text.knob(v)}" for k, v in group.axes_without("defense").items())
    memory = group.get("peak_memory_mb")
    return [
        *(label, text.cut(", ".join(setting), 80), harm, _shown(group.get("refusal_rate"))),
        *(removed, null, task, change, _shown(group.get("over_refusal")), _seconds(group)),
        memory.number() if memory else "–",
    ]


def _trials(groups: Sequence[Group]) -> list[Trial]:
    tuned = [g for g in groups if g.get("harmful_score") and g.method != "none"]
    trials = []
    for group in tuned:
        if group.defense == "none" or "(null)" in group.defense:
            continue
        same = siblings(group, tuned, "defense")
        plain = next((g for g in same if g.defense == "none"), None)
        null = next((g for g in same if _is_null_of(g, group)), None)
        if plain is not None:
            trials.append(Trial(group, plain, null))
    return trials


def _is_null_of(null: Group, group: Group) -> bool:
    def bare(item: Group) -> dict[str, Any]:
        knobs = {k: v for k, v in item.settings.items() if k.startswith("defense")}
        specs = item.settings.get("defense")
        if isinstance(specs, list):
            knobs["defense"] = [{k: v for k, v in s.items() if k != "null"} for s in specs]
        return knobs

    named = " + ".join(f"{part} (null)" for part in group.defense.split(" + "))
    return null.defense == named and bare(null) == bare(group)


def removed(trial: Trial) -> str:
    """`81 % [70, 93]`: the share of the excess removed, with a joint interval over seeds and
    requests (Fieller)."""
    share = trial.removed
    if share is None:
        return "–"
    ends = part_removed(trial.plain, trial.group, "harmful_score", level(trial.settings))
    sides = [trial.group.stats["harmful_score"], trial.plain.stats["harmful_score"]]
    mark = ONE_SEED if any(stat.scope == "model" for stat in sides) else ""
    interval = f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else ""
    return f"{100 * share:.0f} %{interval}{mark}"


def _null(test: Gap | None, p: float | None) -> str:
    if test is None:
        return "–"
    return test.shown if p is None else f"{test.shown}, p {text.chance(p)}"


def _seconds(group: Group) -> str:
    """Seconds of the alignment, if it is the defense's own, and of the fine-tuning."""
    parts = (group.get("align_seconds"), group.get("train_seconds"))
    return " + ".join(f"{s.value:.0f}" for s in parts if s and s.value is not None) or "–"


def _shown(stat: Stat | None) -> str:
    return stat.shown if stat else "–"


def _value(group: Group, metric: str) -> float:
    stat = group.get(metric)
    return (stat.value or 0.0) if stat else 0.0
