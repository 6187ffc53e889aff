"""Sentences about memorization: bits of the secrets that a model reveals, by how often it saw them,
and of controls it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from backfire import text
from backfire.results.groups import ONE_SEED, Group, Stat, name, varying
from backfire.results.intervals import at

RANDOM = 1 / math.log(2)
"""Mean exposure in bits of a code drawn at random, all of whose ranks are equally likely."""
MEASURES = ("exposure", "exposure_estimated")


def exposures(group: Group) -> dict[int, Stat]:
    """Number of insertions -> exposure, 0 for the controls; estimated where no exact one exists."""
    for measure in MEASURES:
        by_repeats = {
            0 if stat.part == "control" else int(stat.part): stat
            for stat in group.stats.values()
            if stat.name == measure and stat.value is not None
            if stat.part == "control" or stat.part.isdecimal()
        }
        if any(by_repeats):
            return dict(sorted(by_repeats.items()))
    return {}


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups with an exposure."""
    return [group for group in groups if exposures(group)]


def strongest(groups: Sequence[Group]) -> list[Group]:
    """For each method and defense the group that reveals most."""
    best: dict[tuple[str, str], Group] = {}
    for group in measured(groups):
        key = (group.method, group.defense)
        if key not in best or _exposure(group) > _exposure(best[key]):
            best[key] = group
    return list(best.values())


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """The group that reveals most, the one that reveals least, and the controls."""
    every = measured(groups)
    if not every:
        return
    columns = varying(every)
    most = max(every, key=_exposure)
    cap = most.get("exposure_cap")
    for group in (most, min(every, key=_exposure))[: min(2, len(every))]:
        # The extremes of several groups differ by chance as well.
        values = [
            f"{_shown(stat)} bits after {text.count(repeats, 'repeat')}"
            for repeats, whole in exposures(group).items()
            if repeats and (stat := at(group, whole.metric, len(every)))
        ]
        which = f" with {name(group, columns)}" if len(every) > 1 else ""
        limit = f" (at most {cap.value:.1f})" if group is most and cap and cap.value else ""
        yield f"Exposure{which} is {text.listing(values)}{limit}."
    controls = [stat for group in every if (stat := exposures(group).get(0))]
    num_outside = sum(
        not stat.low <= RANDOM <= stat.high
        for stat in controls
        if stat.low is not None and stat.high is not None
    )
    if controls:
        mean = sum(stat.value or 0.0 for stat in controls) / len(controls)
        yield (
            f"Canaries that were never inserted have {mean:.2f} bits on average; a random code has "
            f"{RANDOM:.2f}, which is outside the interval in {num_outside} of "
            f"{text.count(len(controls), 'group')}."
        )


def _exposure(group: Group) -> float:
    return sum(stat.value or 0.0 for repeats, stat in exposures(group).items() if repeats)


def _shown(stat: Stat) -> str:
    """To a tenth of a bit."""
    ends = "" if stat.low is None else f" [{stat.low:.1f}, {stat.high:.1f}]"
    return f"{stat.value:.1f}{ends}{ONE_SEED if ends and stat.scope == 'model' else ''}"
