"""The figures of the report, each an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from backfire import text
from backfire.report.svg import INK, MUTED, PAPER, SERIES, drawing, svg
from backfire.results.groups import Group, Stat, name, varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line: TypeAlias = list[tuple[Group, Stat]]
Style: TypeAlias = dict[str, Any]
_MARKERS: Final = "osD^vP"
_DASHES: Final = ("--", ":", "-.", (0, (6, 1)), (0, (1, 3)), (0, (4, 1, 1, 1, 1, 1)))
MOST_ROWS: Final = 24
MOST_LINES: Final = len(SERIES)


def by_rate(groups: Sequence[Group], metric: str) -> str:
    """A metric against the poison rate: a line per attack, method and defense, and each attack's
    baseline."""
    lines = series(groups, metric)
    floors = _floors(lines.values(), metric)
    rates = sorted({group.rate for line in lines.values() for group, _ in line})
    place = _log_places(rates)
    with drawing() as new:
        across = 3 if max(map(len, lines)) < 9 else 2
        entries = len(lines) + max(0, len(floors) - 1)
        figure, axes = new(262 + 17 * (entries // across + 1))
        for number, (label, line) in enumerate(lines.items()):
            shift = 0.03 * (number - (len(lines) - 1) / 2)
            _line(axes, number, label, [place[group.rate] + shift for group, _ in line], line)
        for number, (attack, floor) in enumerate(floors.items()):
            _floor(axes, place, floor, attack if len(floors) > 1 else "", number)
        axes.set_xticks([place[rate] for rate in rates], [text.share(rate) for rate in rates])
        axes.grid(axis="x", visible=False)
        scale = ", log scale" if sum(rate > 0 for rate in rates) > 1 else ""
        axes.set_xlabel(f"poison rate{scale}")
        _numbers(axes, "y", [stat for line in lines.values() for _, stat in line])
        figure.legend(loc="outside upper left", ncols=across, borderpad=0, columnspacing=1.4)
        return svg(figure, f"{text.title(metric)} against the poison rate")


def memory(lines: Mapping[str, Mapping[int, tuple[Group, Stat]]], cap: float, chance: float) -> str:
    """Exposure against the number of insertions, controls on the left: a line per label. `cap` is
    the largest possible exposure, `chance` the mean of a random code, both in bits."""
    repeats = sorted({number for line in lines.values() for number in line})
    place = _log_places(repeats)
    with drawing() as new:
        figure, axes = new(262 + 17 * ((len(lines) + 1) // 3 + 1))
        axes.axhline(cap, color=MUTED, linewidth=1, linestyle=":")
        axes.axhline(chance, color=MUTED, linewidth=1.5, linestyle="--", label="random code")
        for number, (label, line) in enumerate(lines.items()):
            shift = 0.03 * (number - (len(lines) - 1) / 2)
            _line(axes, number, label, [place[n] + shift for n in line], list(line.values()))
        axes.set_xticks([place[n] for n in repeats], [f"{n:,}" if n else "never" for n in repeats])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("rows with the secret, log scale")
        axes.set(ylim=(-0.04 * cap, 1.06 * cap), ylabel="exposure in bits")
        figure.legend(loc="outside upper left", ncols=3, borderpad=0, columnspacing=1.4)
        return svg(figure, "Exposure against the number of rows with the secret")


def levels(groups: Sequence[Group], metric: str) -> str:
    """A metric of each group with its interval, and its baseline if there is one."""
    shown = [(group, stat) for group in groups if (stat := group.get(metric))][:MOST_ROWS]
    columns = varying([group for group, _ in shown])
    dot: Style = {"color": SERIES[0], "markeredgecolor": PAPER, "markersize": 9}
    tick: Style = {"color": MUTED, "markersize": 14, "markeredgewidth": 2}
    floors = [group.side(metric, "floor") for group, _ in shown]
    with drawing() as new:
        figure, axes = new(70 + 27 * len(shown))
        at = [(_scaled(floor), row) for row, floor in enumerate(floors) if floor]
        if at:
            axes.plot(*zip(*at, strict=True), "|", label="baseline", **tick)
            figure.legend(loc="outside upper left", borderpad=0)
        for row, (_, stat) in enumerate(shown):
            _whisker(axes, row, stat, SERIES[0])
            style = _hollow(SERIES[0]) if stat.scope == "model" else dot
            axes.plot([_scaled(stat)], [row], "o", **style)
        _rows(axes, [name(group, columns) for group, _ in shown])
        _numbers(axes, "x", [stat for _, stat in shown])
        return svg(figure, f"{text.title(metric)} by {text.listing(columns) or 'group'}")


def before_after(base: Group, tuned: Group, metric: str) -> str:
    """Bars of the base and the tuned model: over all rows, then by part (such as a language)."""
    whole = tuned.stats[metric]
    same = (whole.name, whole.unit)
    ours = [stat for stat in tuned.stats.values() if (stat.name, stat.unit) == same]
    both = [(base.get(stat.metric), tuned.get(stat.metric)) for stat in ours]
    pairs = [(before, after) for before, after in both if before and after][:MOST_ROWS]
    sides = (("base model", MUTED, 0.45, -0.2), ("fine-tuned", SERIES[0], 0.85, 0.2))
    with drawing() as new:
        figure, axes = new(84 + 36 * len(pairs))
        for (label, color, alpha, shift), stats in zip(
            sides, zip(*pairs, strict=True), strict=True
        ):
            style: Style = {"color": color, "alpha": alpha, "label": label, "linewidth": 0}
            places = [row + shift for row in range(len(pairs))]
            axes.barh(places, [_scaled(stat) for stat in stats], 0.36, **style)
            for row, stat in zip(places, stats, strict=True):
                _whisker(axes, row, stat, INK, width=1.4)
        _rows(axes, [after.part or "all rows" for _, after in pairs])
        _numbers(axes, "x", [stat for pair in pairs for stat in pair])
        # Bars start at zero and end at the largest possible value.
        axes.set_xlim(0, 1.02 * _scale(whole) if _is_bounded(whole) else None)
        figure.legend(loc="outside upper left", ncols=2, borderpad=0, columnspacing=1.4)
        return svg(figure, f"{text.title(metric)} of the base model and of the fine-tuned one")


def confusion(title: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """True labels as rows, predictions as columns; shade: share of the row."""
    shown = [text.cut(text.line(label), 14) for label in labels]
    with drawing() as new:
        figure, axes = new(90 + 44 * len(labels))
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                part = count / max(1, sum(line))
                left, right, top, bottom = column + 0.02, column + 0.98, row + 0.03, row + 0.97
                shade: Style = {"color": SERIES[0], "alpha": 0.05 + 0.85 * part, "linewidth": 0}
                axes.fill_between([left, right], top, bottom, **shade)
                ink: Style = {"color": PAPER if part > 0.5 else INK, "ha": "center", "va": "center"}
                axes.text(column + 0.5, row + 0.5, f"{count:,}", **ink)
        middle = [place + 0.5 for place in range(len(labels))]
        axes.set_xticks(middle, shown, rotation=30 if len(labels) > 4 else 0)
        axes.set_yticks(middle, shown)
        axes.set(xlim=(0, len(labels)), ylim=(len(labels), 0), xlabel="answer", ylabel="true label")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg(figure, title)


def series(groups: Sequence[Group], metric: str) -> dict[str, Line]:
    """Lines of groups that differ only in their poison rate, each starting with its clean group;
    one without an attack starts the line of every attack."""
    measured = [(group, stat) for group in groups if (stat := group.get(metric))]
    columns = [column for column in varying([group for group, _ in measured]) if column != "rate"]
    attacks = {group.attack for group, _ in measured if group.attack != "none"} or {"none"}
    lines: dict[str, Line] = {}
    for group, stat in measured:
        for attack in sorted(attacks) if group.attack == "none" else [group.attack]:
            shown = {"attack": text.line(attack)}
            words = [shown.get(column) or name(group, [column]) for column in columns]
            lines.setdefault(", ".join(words) or text.title(metric), []).append((group, stat))
    lines = {label: line for label, line in lines.items() if any(g.poisoned for g, _ in line)}
    for line in lines.values():
        line.sort(key=lambda pair: pair[0].rate)
    return {label: lines[label] for label in list(lines)[: len(SERIES)]}


def _log_places(rates: Sequence[float]) -> dict[float, float]:
    """Positions on a logarithmic axis, with zero one step left of the smallest rate."""
    positive = [rate for rate in rates if rate > 0] or [1.0]
    span = math.log10(positive[-1] / positive[0]) or 1.0
    step = span / max(1, len(positive) - 1)
    return {rate: math.log10(rate / positive[0]) / step + 1 if rate > 0 else 0.0 for rate in rates}


def _line(axes: Axes, number: int, label: str, places: Sequence[float], line: Line) -> None:
    color, marker = SERIES[number], _MARKERS[number]
    for place, (_, stat) in zip(places, line, strict=True):
        if stat.low is not None and stat.high is not None:
            ends = [_scale(stat) * end for end in (stat.low, stat.high)]
            width = 1.2 if stat.scope == "model" else 3
            axes.plot([place, place], ends, color=color, alpha=0.45, linewidth=width)
    style: Style = {"marker": marker, "markersize": 8, "markeredgecolor": PAPER}
    values = [_scaled(stat) for _, stat in line]
    axes.plot(places, values, color=color, label=text.cut(label, 28), **style)
    for place, (_, stat) in zip(places, line, strict=True):
        if stat.scope == "model":
            axes.plot([place], [_scaled(stat)], marker, **_hollow(color))


def _floors(lines: Iterable[Line], metric: str) -> dict[str, dict[float, float]]:
    """The mean baseline at each rate, by attack: each attack has its own triggered rows."""
    found: dict[str, dict[float, list[float]]] = {}
    for line in lines:
        attack = next((group.attack for group, _ in line if group.attack != "none"), "none")
        for group, _ in line:
            if floor := group.side(metric, "floor"):
                at = found.setdefault(attack, {})
                at.setdefault(group.rate, []).append(_scaled(floor))
    return {
        attack: {rate: sum(at[rate]) / len(at[rate]) for rate in sorted(at)}
        for attack, at in found.items()
    }


def _floor(
    axes: Axes, place: Mapping[float, float], floor: Mapping[float, float], of: str, number: int
) -> None:
    label = text.cut(f"baseline, {text.line(of)}" if of else "baseline", 28)
    style: Style = {"color": MUTED, "linewidth": 1.5, "label": label}
    dashes = _DASHES[number % len(_DASHES)]
    axes.plot([place[rate] for rate in floor], [*floor.values()], linestyle=dashes, **style)


def _whisker(axes: Axes, row: float, stat: Stat, color: str, width: float = 3) -> None:
    if stat.low is not None and stat.high is not None:
        ends = [_scale(stat) * end for end in (stat.low, stat.high)]
        thin = 0.4 if stat.scope == "model" else 1.0
        axes.plot(ends, [row, row], color=color, alpha=0.6, linewidth=thin * width)


def _hollow(color: str) -> Style:
    """The style of a dot for one trained model only."""
    return {"markerfacecolor": PAPER, "markeredgecolor": color, "markersize": 8}


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    lines = [wrap(text.line(label), 27, max_lines=2, placeholder="…") for label in labels]
    shown = ["\n".join(two) for two in lines]
    axes.set_yticks(range(len(labels)), shown, linespacing=1.0)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _numbers(axes: Axes, which: str, stats: Sequence[Stat]) -> None:
    """Format the axis of the values. A share is in per cent, and the axis goes from 0 to 100 unless
    all values are high and close together, so that no small effect looks like a large one."""
    axis, limits, label = (
        (axes.yaxis, axes.set_ylim, axes.set_ylabel)
        if which == "y"
        else (axes.xaxis, axes.set_xlim, axes.set_xlabel)
    )
    first = stats[0]
    label(first.title)
    if first.unit == "share":
        axis.set_major_formatter(lambda value, _: f"{value:g} %")
    ends = [end for stat in stats for end in (stat.low, stat.high, stat.value) if end is not None]
    if ends and _is_bounded(first):
        low, high = min(ends), max(ends)
        is_narrow = high - low <= 0.4 and low >= 0.3
        shown = (low - 0.05, min(1.005, high + 0.05)) if is_narrow else (-0.02, 1.02)
        limits(*(_scale(first) * end for end in shown))


def _is_bounded(stat: Stat) -> bool:
    return stat.unit in ("share", "score") and not stat.is_change


def _scaled(stat: Stat) -> float:
    return _scale(stat) * (stat.value or 0.0)


def _scale(stat: Stat) -> float:
    return 100.0 if stat.unit == "share" else 1.0
