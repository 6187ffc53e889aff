"""The page of an audit: one file without scripts; every text is cleaned and escaped."""

from __future__ import annotations

from pathlib import Path

from backfire.audit.engine import Audit
from backfire.audit.output import BLIND, findings, sections, summary
from backfire.report.page import template
from backfire.store import write_atomic


def write_page(audit: Audit, path: Path) -> None:
    """Write the page of an audit."""
    write_atomic(path, render(audit))


def render(audit: Audit) -> str:
    """The page as text."""
    return template("audit.html.j2").render(
        model=audit.model,
        answer=summary(audit),
        findings=findings(audit),
        sections=sections(audit),
        notes=[*audit.notes, BLIND],
    )
