"""What a run says of memory: how many bits of the secrets a model gives away, by how often it saw
them, beside controls it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from backfire import text
from backfire.results.groups import ALONE, Group, Stat, name, varying
from backfire.results.intervals import at

RANDOM = 1 / math.log(2)
"""Bits that a code drawn at random gives on average: its rank is as likely one as another."""
MEASURES = ("exposure", "exposure_estimated")


def doses(group: Group) -> dict[int, Stat]:
    """How often a secret was inserted -> exposure, 0 for the controls; by the exact number where
    there is one."""
    for measure in MEASURES:
        ours = (s for s in group.stats.values() if s.part and s.name == measure)
        parts = {stat.part: stat for stat in ours}
        found = {
            0 if part == "control" else int(part): stat
            for part, stat in parts.items()
            if stat.value is not None and (part == "control" or part.isdecimal())
        }
        if any(found):
            return dict(sorted(found.items()))
    return {}


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups whose secrets were looked for."""
    return [group for group in groups if doses(group)]


def strongest(groups: Sequence[Group]) -> list[Group]:
    """Of each method and defense the group that gives most away."""
    best: dict[tuple[str, str], Group] = {}
    for group in measured(groups):
        key = (group.method, group.defense)
        if key not in best or _exposure(group) > _exposure(best[key]):
            best[key] = group
    return list(best.values())


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """The group that gives most away, the one that gives least, and the controls."""
    known = measured(groups)
    if not known:
        return
    columns = varying(known)
    most = max(known, key=_exposure)
    cap = most.get("exposure_cap")
    for group in (most, min(known, key=_exposure))[: min(2, len(known))]:
        # The ends of several groups lie far apart by chance as well.
        picked = {dose: at(group, stat.metric, len(known)) for dose, stat in doses(group).items()}
        found = {dose: stat for dose, stat in picked.items() if dose and stat}
        told = [f"{_said(stat)} after {text.count(dose, 'repeat')}" for dose, stat in found.items()]
        which = f"With {name(group, columns)}" if len(known) > 1 else "The model"
        verb = "exposure is" if len(known) > 1 else "gives away"
        limit = f" of {cap.value:.1f} at most" if group is most and cap and cap.value else ""
        yield f"{which} {verb} {text.listing(told)}, in bits{limit}."
    controls = [stat for group in known if (stat := doses(group).get(0))]
    apart = sum(
        not stat.low <= RANDOM <= stat.high
        for stat in controls
        if stat.low is not None and stat.high is not None
    )
    if controls:
        mean = sum(stat.value or 0.0 for stat in controls) / len(controls)
        groups_left = text.count(len(controls), "group")
        yield (
            f"Canaries that were never inserted have {mean:.2f} bits on average, where a random "
            f"code has {RANDOM:.2f}; that is outside the interval in {apart} of {groups_left}."
        )


def _exposure(group: Group) -> float:
    return sum(stat.value or 0.0 for dose, stat in doses(group).items() if dose)


def _said(stat: Stat) -> str:
    """To a tenth of a bit."""
    ends = "" if stat.low is None else f" [{stat.low:.1f}, {stat.high:.1f}]"
    return f"{stat.value:.1f}{ends}{ALONE if ends and stat.scope == 'model' else ''}"
