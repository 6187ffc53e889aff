"""The report: one self-contained page without scripts, in which everything from a file is text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from backfire import text
from backfire.report import judges, sections
from backfire.report.findings import findings, main_group
from backfire.report.statements import answer, question
from backfire.results import paired_tests, ranking
from backfire.results.groups import group
from backfire.results.intervals import notes
from backfire.results.load import left_out, load
from backfire.store import write_atomic

_UNIT: Final = re.compile(r"(?<=\d) (%|points)")
_INTERVAL: Final = re.compile(r"\[(-?[\d.,]+), (-?[\d.,]+)\]")


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder and say where it is."""
    path = run / "report.html"
    write_atomic(path, render(run))
    return path


def render(run: Path) -> str:
    """The page of a run folder as text."""
    cells = load(run)
    groups = group(cells)
    asked = question(run)
    shown = main_group(groups)
    return _template().render(
        recipe=cells[0].recipe,
        asked=asked,
        answer=answer(groups, cells, asked.question),
        facts=sections.facts(cells, groups),
        numbers=sections.numbers(groups),
        notes=list(notes(groups)),
        details=sections.details(groups),
        agreements=judges.agreements(groups),
        ranking=ranking.table(groups),
        against=paired_tests.lines(groups),
        findings=[(item.sentence, Markup(item.svg), item.caption) for item in findings(groups)],
        **sections.rows(shown, groups),
        doses=sections.doses(groups),
        checks=sections.checks(cells),
        warnings=sections.warnings(cells, left_out(run)),
        failures=sections.failures(cells),
        environment=sections.environment(cells),
        num_cells=text.count(len(cells), "cell"),
        keys=[(cell.slug, cell.key, cell.status, sections.stages(cell)) for cell in cells],
    )


def _template() -> Template:
    environment = Environment(
        autoescape=True,
        finalize=_finalize,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _finalize(value: Any) -> Any:
    """Every text is cleaned on its way out, whoever forgot to; then jinja escapes it."""
    if value is None or isinstance(value, Markup):
        return value or ""
    # A unit stays with its number, an interval on one line.
    said = _UNIT.sub("\u00a0\\1", text.clean(value))
    return _INTERVAL.sub("[\\1,\u00a0\\2]", said)
