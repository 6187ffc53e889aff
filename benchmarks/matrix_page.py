"""The result of `benchmarks.matrix` as a page, and its figures.

    python -m benchmarks.matrix_page RESULT.json

writes the last part of `docs/benchmarks.md`, and its pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from backfire.store import read_json, write_atomic
from benchmarks.matrix import SCRIPTS
from benchmarks.memory import ROOT
from benchmarks.workload import AXES, described

TARGETS = {"training": 3.3, "label_scoring": 4.0, "generation": 2.0, "matrix": 2.8, "limit": 0.6}
"""The ratios that are wanted, and the share of the limit, on two cores in float32."""
BFLOAT16 = {"matrix": 4.0}
"""The same with bfloat16 products against a script in float32."""
PICTURES = {
    "makespan-cells.svg": "Makespan over cells",
    "makespan-rows.svg": "Makespan over training rows",
}
STRONG = "script, two processes"
MARK = "<!-- What follows is written by `python -m benchmarks.matrix_page RESULT.json`. -->"
_NAMES = {
    "training": "training steps",
    "training, TRL": "training steps, against TRL's `SFTTrainer`",
    "label_scoring": "label scoring, against lm-eval's shortcut",
    "generation": "replies",
}

Result = Mapping[str, Any]


def summary(result: Result) -> dict[str, Any]:
    """The ratios and shares that the page begins with."""
    least = result["least_flops"]
    cells, flops = least["cells"], sum(v for name, v in least.items() if name != "cells")
    limit = flops / max(peaks(result))
    ours = makespan(result, "backfire", cells)
    assert ours
    ratios = {side: script(result, side, cells) / ours for side in SCRIPTS}
    return {
        "cells": cells,
        "matrix": {side: round(value, 2) for side, value in ratios.items()},
        **({"parts": result["parts"]["ratios"]} if result["parts"] else {}),
        "training": {side: round(training(result, side), 2) for side in SCRIPTS},
        "limit_seconds": round(limit, 1),
        "limit": {
            "backfire": round(limit / ours, 3),
            **{side: round(limit / script(result, side, cells), 3) for side in SCRIPTS},
        },
    }


def makespan(result: Result, side: str, cells: int) -> float | None:
    """Median of the measured makespans; None without any."""
    found = [run["seconds"] for run in result["runs"][side] if run["cells"] == cells]
    return median(found) if found else None


def script(result: Result, side: str, cells: int) -> float:
    """Makespan of the script: measured, or else computed."""
    return makespan(result, side, cells) or float(result["computed"][str(cells)][side])


def peaks(result: Result) -> tuple[float, float]:
    """FLOP/s of the machine's products in backfire's type, before the measurements and after."""
    kind, before = result["sizes"]["compute"], result["peak_flops"]
    return before[kind], result.get("peak_flops_after", before)[kind]


def training(result: Result, side: str) -> float:
    """Core-seconds of the training steps of the matrix that both sides ran: the script's, in
    backfire's."""
    cells = shared_cells(result)
    ours, theirs = (
        median(
            run["core_seconds"]["training"] for run in result["runs"][who] if run["cells"] == cells
        )
        for who in ("backfire", side)
    )
    return float(theirs / ours)


def markdown(result: Result) -> str:
    """The page without its figures."""
    made, sizes, found = result["environment"], result["sizes"], summary(result)
    attacks, rates, defenses, seeds = AXES[found["cells"]]
    lines = [
        f"{described(found['cells'])}: attacks {attacks}, poison rates {rates}, defenses "
        f"{defenses}, seeds {seeds}; a random Llama of the shape `{sizes['shape']}`, aligned once; "
        f"LoRA (rank 8) on {sizes['rows']} rows as long as those of SST-2, template alpaca; labels "
        f"of {sizes['test_rows']} test rows with and without the trigger; "
        f"{sizes['requests']} replies of at most {sizes['new_tokens']} tokens. backfire's products "
        f"in {sizes['compute']}, the script's in float32. {made['cpu']}, {made['cores']} cores, "
        f"torch {made['torch']}, transformers {made['transformers']}, peft {made['peft']}; commit "
        f"{str(made['commit'])[:9]}; load average before and after {result['load']['before']:.1f} "
        f"and {result['load']['after']:.1f}; {result['minutes']:.0f} minutes.",
        "",
        *_ratios(result, found),
        "",
        *_equal(result),
        "",
        *_makespans(result),
        "",
        *_by_rows(result),
        "",
        *_spent(result),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _ratios(result: Result, found: Mapping[str, Any]) -> list[str]:
    mixed = result["sizes"]["compute"] != "float32"
    targets = BFLOAT16 if mixed else TARGETS
    measured = makespan(result, STRONG, found["cells"])
    how = "measured" if measured else "computed from its parts"
    rows = [
        (
            f"makespan of {described(found['cells'])}, {side} ({how})",
            f"{value:.2f}",
            f"{targets['matrix']:g}" if side == STRONG else "",
        )
        for side, value in found["matrix"].items()
    ]
    rows += [
        (
            f"training steps of {described(shared_cells(result))}, {side}, by core-seconds",
            f"{value:.2f}",
            "",
        )
        for side, value in found["training"].items()
    ]
    rows += [
        (f"one cell: {_NAMES[part]}", f"{value:.2f}", f"{targets[part]:g}")
        if part in targets
        else (f"one cell: {_NAMES[part]}", f"{value:.2f}", "")
        for part, value in found.get("parts", {}).items()
    ]
    limit = (
        f"share of the limit, {found['limit_seconds']:.0f} s at {max(peaks(result)) / 1e9:.0f} "
        "GFLOP/s of all cores"
    )
    rows += [
        (
            f"{limit}, {side}",
            f"{value:.0%}",
            f"{targets['limit']:.0%}" if side == "backfire" and "limit" in targets else "",
        )
        for side, value in found["limit"].items()
    ]
    before, after = (peak / 1e9 for peak in peaks(result))
    return [
        *_table(("speed against the script in float32", "ratio", "target"), rows),
        "",
        f"Large matrix products in {result['sizes']['compute']} reached {before:.0f} GFLOP/s "
        f"before the measurements and {after:.0f} after them; the limit is by the higher."
        + _rows_of_parts(result),
    ]


def _rows_of_parts(result: Result) -> str:
    if not result["parts"]:
        return ""
    rows, at_once = result["parts"]["rows"], result["parts"].get("batch_size")
    steps = f", {rows['train'] // at_once - 1} steps" if at_once else ""
    return (
        f" The parts of one cell: {rows['train']} training rows{steps}, and {rows['test']} test "
        "rows, by processor time."
    )


def _equal(result: Result) -> list[str]:
    equal, parts = result["equality"], result["parts"]
    rows = [
        (name, f"{value:.1e}" if isinstance(value, float) and value < 0.5 else f"{value:g}")
        for name, value in equal.items()
    ]
    if parts:
        same = parts["equality"]
        rows.append(("one cell: largest difference of a loss", f"{same['loss difference']:.1e}"))
        if (trl := same["loss difference, trl"]) is not None:
            rows.append(("one cell: the same between backfire and TRL", f"{trl:.1e}"))
        rows.append(("one cell: equal replies, same weights", f"{same['equal replies']:g}"))
    return _table(("equality of the results", ""), rows)


def _makespans(result: Result) -> list[str]:
    rows = []
    for cells in map(int, result["computed"]):
        ours = makespan(result, "backfire", cells)
        line = [described(cells), f"{ours:.1f}" if ours else ""]
        for side in SCRIPTS:
            measured, computed = (
                makespan(result, side, cells),
                result["computed"][str(cells)][side],
            )
            line.append(f"{measured:.1f} ({computed:.1f})" if measured else f"({computed:.1f})")
        line.append(f"{script(result, STRONG, cells) / ours:.2f}" if ours else "")
        rows.append(line)
    head = ("makespan, s", "backfire", *SCRIPTS, "ratio to two processes")
    return [
        *_table(head, rows),
        "",
        "In parentheses: computed from the median times of the script's parts (start, alignment, a "
        "training run, an evaluation), which do not depend on each other.",
    ]


def _by_rows(result: Result) -> list[str]:
    rows = [
        (f"{rows:,}", f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
        for rows, ours, theirs in by_rows(result)
    ]
    head = ("training rows", "backfire", STRONG, "ratio")
    return [
        *_table(head, rows),
        "",
        f"Makespans of {described(cells_by_rows(result))} in seconds; with other than "
        f"{result['sizes']['rows']} rows the script's are computed, its training in proportion to "
        "its rows.",
    ]


def shared_cells(result: Result) -> int:
    """Number of cells of the matrix that both sides ran."""
    return int(result["runs"][STRONG][0]["cells"])


def cells_by_rows(result: Result) -> int:
    """Number of cells of the matrix whose rows are varied."""
    return int(result["by_rows"][0]["cells"]) if result["by_rows"] else shared_cells(result)


def by_rows(result: Result) -> list[tuple[int, float, float]]:
    """Training rows, and the makespans of backfire and of the script as two processes."""
    cells = cells_by_rows(result)
    ours, found = makespan(result, "backfire", cells), []
    if ours:
        found.append((result["sizes"]["rows"], ours, script(result, STRONG, cells)))
    found += [(ln["rows"], ln["seconds"], ln["computed"][STRONG]) for ln in result["by_rows"]]
    return sorted(found)


def _spent(result: Result) -> list[str]:
    """Where the core-seconds went, of the last run of each side at each of two sizes."""
    cores, largest = result["environment"]["cores"], result["least_flops"]["cells"]
    chosen = [
        (f"{side}, {described(cells)}", run)
        for side, runs in result["runs"].items()
        for cells in dict.fromkeys((shared_cells(result), largest))
        for run in [run for run in runs if run["cells"] == cells][-1:]
    ]
    rows = []
    for title, run in chosen:
        spent = run["core_seconds"]
        rest = run["cpu"] - sum(spent.values())
        idle = cores * run["seconds"] - run["cpu"]
        parts = (spent[part] for part in ("alignment", "training", "evaluation"))
        rest += spent.get("start", 0.0)
        cpu = [*parts, rest, idle]
        shares = [f"{x:.0f} ({x / (cores * run['seconds']):.0%})" for x in cpu]
        rows.append([title, str(run["trainings"]), *shares, f"{run['peak_mb']:.0f}"])
    head = (
        "core-seconds",
        "training runs",
        "alignment",
        "training",
        "evaluation",
        "start and the rest",
        "idle",
        "peak memory, MB",
    )
    return [
        *_table(head, rows),
        "",
        "Alignment and training are the steps alone, without loading and saving. backfire's parts "
        "are by the times in its results, all cores at work; the script's by processor time.",
    ]


# --------------------------------------------------------------------------------------- docs


def figures(result: Result) -> dict[str, str]:
    """File name -> picture."""
    from backfire.report.svg import alone

    cells = [int(number) for number in result["computed"]]
    lines = {side: [(n, script(result, side, n)) for n in cells] for side in reversed(SCRIPTS)}
    measured = [(n, makespan(result, "backfire", n)) for n in cells]
    lines["backfire"] = [(n, seconds) for n, seconds in measured if seconds]
    rows = by_rows(result)
    of_rows = {STRONG: [(n, b) for n, _, b in rows], "backfire": [(n, a) for n, a, _ in rows]}
    shown = zip(PICTURES.items(), ((lines, "cells"), (of_rows, "training rows")), strict=True)
    return {name: alone(_figure(*what, title)) for (name, title), what in shown}


def _figure(lines: Mapping[str, Sequence[tuple[int, float]]], what: str, title: str) -> str:
    from backfire.report.svg import SERIES, drawing, svg

    with drawing() as new:
        figure, axes = new(240)
        for (name, points), color in zip(lines.items(), SERIES, strict=False):
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=name)
        axes.set_xlabel(what)
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.legend()
        return svg(figure, title)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix_page", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(argv)
    result = read_json(options.result)
    for name, picture in figures(result).items():
        write_atomic(options.docs / "images" / name, picture)
    page = options.docs / "benchmarks.md"
    before, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    link = f"[{options.result.name}](../benchmarks/results/{options.result.name})"
    pictures = "\n\n".join(f"![{title}](images/{name})" for name, title in PICTURES.items())
    write_atomic(page, f"{before}{mark}\n\n{pictures}\n\nFrom {link}. {markdown(result)}")


if __name__ == "__main__":
    main()
