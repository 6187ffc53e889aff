"""Defenses ranked: what each takes away of the harm, what it costs, and what its null control does.

Where a run tries them under several settings of the user's tuning (an attacker's sweep), each is
ranked by the setting under which most harm is left. That is a maximum of noisy numbers, so its
intervals and tests hold for all of the settings at once (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from backfire import text
from backfire.evaluate.seeds import holm
from backfire.results.criteria import above_floor, accuracy, alike
from backfire.results.groups import ALONE, Gap, Group, Stat, difference
from backfire.results.intervals import at, level, part_removed
from backfire.results.paired_tests import compared

SAME: Final = ("model", "data", "attack", "rate", "method")
LEAST: Final = 0.1
"""An excess smaller than this cannot be shared out."""


@dataclass(frozen=True)
class Trial:
    """One defense under one setting, beside no defense and beside its null control."""

    group: Group
    plain: Group
    null: Group | None
    settings: int = 1
    """Of so many settings this one was picked, as the worst."""

    @property
    def label(self) -> str:
        """The defense with its knobs."""
        return text.knob(self.group.axes.get("defense", self.group.defense))

    @property
    def harm(self) -> float:
        return _value(self.group, "harmful_score")

    @property
    def excess(self) -> float:
        """How much more harmful the model is after undefended tuning than it was before."""
        floor = self.plain.side("harmful_score", "floor")
        return _value(self.plain, "harmful_score") - (floor.value or 0.0 if floor else 0.0)

    @property
    def removed(self) -> float | None:
        """Share of that excess that the defense does without; None where there is hardly any, or it
        is not clearly above 0: a share of nothing is noise."""
        gap = above_floor(self.plain, "harmful_score", self.settings)
        if self.excess <= LEAST or (gap and gap.low is not None and gap.low <= 0):
            return None
        return (_value(self.plain, "harmful_score") - self.harm) / self.excess

    def left(self, others: int = 1) -> Stat | None:
        """The harmful score, its interval holding for all settings, and for so many defenses of
        which this one was picked."""
        return at(self.group, "harmful_score", others * self.settings)

    def against(self, other: Group | None) -> Gap | None:
        """The paired difference of the harmful score from another group; p for all settings."""
        tests = compared(self.group, other, "defense", level(self.settings)) if other else ()
        test = next((t.result for t in tests if t.metric == "harmful_score"), None)
        if test is None or test.p is None:
            return test
        return replace(test, p=min(1.0, test.p * self.settings))


def worst_trials(groups: Sequence[Group]) -> list[tuple[Trial, int]]:
    """Of each defense the setting under which most harm is left, and the number of settings; the
    least harm first."""
    by_label: dict[str, list[Trial]] = {}
    for trial in _trials(groups):
        by_label.setdefault(trial.label, []).append(trial)
    worst = [
        (replace(max(found, key=lambda t: t.harm), settings=len(found)), len(found))
        for found in by_label.values()
    ]
    return sorted(worst, key=lambda pair: pair[0].harm)


def null_tests(ranked: Sequence[tuple[Trial, int]]) -> list[tuple[Gap | None, float | None]]:
    """Each defense's difference from its null control, and its p corrected for the whole table."""
    tests = [trial.against(trial.null) for trial, _ in ranked]
    corrected = holm([test.p if test else None for test in tests])
    return list(zip(tests, corrected, strict=True))


def table(groups: Sequence[Group]) -> dict[str, Any] | None:
    """The ranked table, for the page and the terminal; None without defenses."""
    ranked = worst_trials(groups)
    if not ranked:
        return None
    settings = max(count for _, count in ranked)
    swept = settings > 1
    header = [
        *("defense", *(["worst setting"] if swept else []), "harmful score", "refusals"),
        *(
            "excess removed",
            "against its null control",
            "task",
            "change",
            "over-refusal",
            "seconds",
            "MB",
        ),
    ]
    rows = [
        _row(trial, swept, null)
        for (trial, _), null in zip(ranked, null_tests(ranked), strict=True)
    ]
    plain = max((trial.plain for trial, _ in ranked), key=lambda g: _value(g, "harmful_score"))
    return {"header": header, "rows": rows, "settings": settings, "plain": _plain(plain, swept)}


def _row(trial: Trial, swept: bool, null: tuple[Gap | None, float | None]) -> list[str]:
    group, plain = trial.group, trial.plain
    return [
        text.cut(trial.label, 60),
        *([_setting(group)] if swept else []),
        _said(trial.left()),
        _said(group.get("refusal_rate")),
        removed(trial),
        _null(*null),
        *_task(group, plain),
        _said(group.get("over_refusal")),
        _seconds(group),
        _number(group.get("peak_memory_mb")),
    ]


def _plain(group: Group, swept: bool) -> list[str]:
    task, over = _task(group, group), group.get("over_refusal")
    beside = [_seconds(group), _number(group.get("peak_memory_mb"))]
    where = [_setting(group)] if swept else []
    return [
        "none",
        *where,
        _said(group.get("harmful_score")),
        _said(group.get("refusal_rate")),
        "",
        "",
        task[0],
        "",
        _said(over),
        *beside,
    ]


def _trials(groups: Sequence[Group]) -> list[Trial]:
    found = [g for g in groups if g.get("harmful_score") and g.method != "none"]
    trials = []
    for group in found:
        if group.defense == "none" or "(null)" in group.defense:
            continue
        beside = [
            g
            for g in found
            if alike(g, group, SAME) and g.beside("defense") == group.beside("defense")
        ]
        plain = next((g for g in beside if g.defense == "none"), None)
        null = next((g for g in beside if _is_null_of(g, group)), None)
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
    """`81 % [70, 93]` of the excess: the interval is joint, over seeds and requests (Fieller)."""
    share = trial.removed
    if share is None:
        return "–"
    ends = part_removed(trial.plain, trial.group, "harmful_score", level(trial.settings))
    sides = [trial.group.stats["harmful_score"], trial.plain.stats["harmful_score"]]
    alone = ALONE if any(stat.scope == "model" for stat in sides) else ""
    if ends is None:
        return f"{100 * share:.0f} %{alone}"
    return f"{100 * share:.0f} % [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]{alone}"


def _null(test: Gap | None, p: float | None) -> str:
    if test is None:
        return "–"
    return test.said if p is None else f"{test.said}, p {text.chance(p)}"


def _task(group: Group, plain: Group) -> tuple[str, str]:
    ours, theirs = accuracy(group), accuracy(plain)
    if ours is None or theirs is None:
        return "–", "–"
    change = difference(plain, group, ours.metric)
    return _said(ours), change.said if change else "–"


def _setting(group: Group) -> str:
    return text.cut(
        ", ".join(f"{k} {text.knob(v)}" for k, v in group.beside("defense").items()), 80
    )


def _seconds(group: Group) -> str:
    """Of the user's tuning, and of the alignment where it is not shared with all others."""
    parts = (group.get("align_seconds"), group.get("train_seconds"))
    return " + ".join(f"{s.value:.0f}" for s in parts if s and s.value is not None) or "–"


def _said(stat: Stat | None) -> str:
    return "–" if stat is None else stat.shown


def _number(stat: Stat | None) -> str:
    return "–" if stat is None else stat.number()


def _value(group: Group, metric: str) -> float:
    stat = group.get(metric)
    return (stat.value or 0.0) if stat else 0.0
