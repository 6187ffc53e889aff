"""The report: one self-contained page without scripts; everything read from a file is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from backfire import text
from backfire.report import judges, sections
from backfire.report.findings import findings, main_group
from backfire.report.statements import answer, question
from backfire.result import CellResult
from backfire.results import paired_tests, ranking
from backfire.results.groups import group
from backfire.results.intervals import notes
from backfire.results.load import left_out, load
from backfire.results.tables import numbers
from backfire.store import write_atomic

_UNIT: Final = re.compile(r"(?<=\d) (%|points)")
_INTERVAL: Final = re.compile(r"\[(-?[\d.,]+), (-?[\d.,]+)\]")


def write_report(run: Path, cells: Sequence[CellResult] | None = None) -> Path:
    """Write `report.html` into the run folder and return its path; the cells are read if they are
    not given."""
    path = run / "report.html"
    write_atomic(path, render(run, cells))
    return path


def render(run: Path, cells: Sequence[CellResult] | None = None) -> str:
    """The page of a run folder as text."""
    cells = load(run) if cells is None else cells
    groups = group(cells)
    comment = question(run)
    shown = main_group(groups)
    tables = [table for table in numbers(groups) if table.metrics]
    return template("page.html.j2").render(
        recipe=cells[0].recipe,
        comment=comment,
        answer=answer(groups, cells, comment.question),
        facts=sections.facts(cells, groups),
        tables=tables,
        has_baseline=any(base for table in tables for row in table.rows for _, base in row[1]),
        has_seeds=any(len(item.done) > 1 for item in groups),
        notes=list(notes(groups)),
        details=sections.details(groups),
        agreements=judges.agreements(groups),
        ranking=ranking.table(groups),
        tests=paired_tests.table(groups),
        findings=[(item.sentence, Markup(item.svg), item.caption) for item in findings(groups)],
        **sections.rows(shown, groups),
        poisoning=sections.poisoning(groups),
        checks=sections.checks(cells),
        warnings=sections.warnings(cells, left_out(run)),
        failures=sections.failures(cells),
        environment=sections.environment(cells),
        num_cells=text.count(len(cells), "cell"),
        cells=cells,
    )


def template(name: str) -> Template:
    """A template of this folder; all that it outputs is cleaned and escaped."""
    environment = Environment(
        autoescape=True,
        finalize=_finalize,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _finalize(value: Any) -> Any:
    """Clean every text that the template outputs; jinja escapes it afterwards."""
    if value is None or isinstance(value, Markup):
        return value or ""
    # No line break between a number and its unit, or within an interval.
    words = _UNIT.sub("\u00a0\\1", text.clean(value))
    return _INTERVAL.sub("[\\1,\u00a0\\2]", words)
