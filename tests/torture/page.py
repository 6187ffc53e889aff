"""docs/reliability.md, written from docs/reliability.json."""

from __future__ import annotations

from typing import Any

from backfire.store import read_json, write_atomic, write_json
from tests.helpers.places import ROOT
from tests.torture.row import Row
from tests.torture.rows import ROWS

DATA, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

What happens when runs are killed, files are damaged, disks are full, and input is hostile.
Generated from [reliability.json](reliability.json) by `make torture`, which runs every row;
`make test` runs the same rows with smaller counts. Do not edit it by hand.

A row counts what went wrong. Figures that must be 0 are marked with =0, and figures that must be
above 0, because without them the row has tested nothing, with >0.

| row | what is done | times | seconds | figures |
| --- | --- | --- | --- | --- |
"""


def load() -> dict[str, Any]:
    """What was measured last, by row."""
    found: dict[str, Any] = read_json(DATA) if DATA.is_file() else {}
    return found


def record(name: str, entry: dict[str, Any]) -> None:
    """Write the result of one row into the JSON file, and the page anew."""
    found = {**load(), name: entry}
    write_json(DATA, {name: found[name] for name in ROWS if name in found})
    write_atomic(PAGE, render(found))


def render(found: dict[str, Any]) -> str:
    """The page."""
    lines = [_line(row, found.get(row.name)) for row in ROWS.values()]
    runs = [entry for entry in found.values() if "figures" in entry]
    total = sum(entry["seconds"] for entry in runs)
    machines = sorted({entry["machine"] for entry in runs})
    foot = f"\nAll rows together took {total / 60:.0f} minutes on: {'; '.join(machines)}.\n"
    return HEAD + "\n".join(lines) + "\n" + (foot if runs else "")


def _line(row: Row, entry: dict[str, Any] | None) -> str:
    if entry is None or "figures" not in entry:
        why = "not run yet" if entry is None else f"not run: {entry['why']}"
        return f"| {row.name} | {row.test} | 0 of {row.full:,} | | {why} |"
    count = entry["count"]
    times = f"{count:,}" if count == row.full else f"{count:,} of {row.full:,}"
    marks = {**dict.fromkeys(row.zero, " (=0)"), **dict.fromkeys(row.some, " (>0)")}
    figures = ", ".join(
        f"{name} {_number(value)}{marks.get(name, '')}" for name, value in entry["figures"].items()
    )
    missed = "" if not entry["missed"] else f" **Missed: {'; '.join(entry['missed'])}.**"
    when = f"{entry['seconds']:,.0f} ({entry['when'][:10]})"
    return f"| {row.name} | {row.test} | {times} | {when} | {figures}{missed} |"


def _number(value: float) -> str:
    return f"{value:,.3g}" if value % 1 else f"{value:,.0f}"
