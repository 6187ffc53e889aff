"""`backfire audit`: what changed in a tuned model against its base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress as Bar

from backfire.audit.bank import base_identity
from backfire.audit.engine import Asked, Audit, audit
from backfire.audit.models import Pair, open_pair
from backfire.audit.output import as_json, as_table
from backfire.audit.page import write_page
from backfire.base import Judge, Row, select
from backfire.base.normalize import normalized
from backfire.commands.files import dataset_spec, spec_with
from backfire.commands.options import echo
from backfire.errors import UserError
from backfire.experiment import Machine
from backfire.launch.job import set_threads
from backfire.pipeline import Context
from backfire.recipe import parse_edit
from backfire.registry import build, names
from backfire.scan.source import Source, open_rows
from backfire.store import Store
from backfire.text import count
from backfire.yaml12 import read_yaml


def start(
    model: str,
    edits: Sequence[str],
    *,
    base: str | None,
    adapter: str | None,
    data: str | None,
    unseen: str | None,
    prompts: str | None,
    judge: str | None,
    system: str,
    triggers: Sequence[str],
    template: str | None,
    limit: int,
    tokens: int,
    out: Path | None,
    form: Literal["table", "json"],
    device: str,
) -> str | None:
    """Run the audit, print it, and write its page; returns a sentence on the page."""
    if base is None:
        raise UserError("Name the model that it was tuned from, as in --base OWNER/NAME.")
    if out and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The output is a page, so --out must end in .html (got {out}).")
    if out and out.is_dir():
        raise UserError(f"{out} is a folder, not a file.")
    if blank := next((one for one in triggers if not one.strip()), None):
        raise UserError(f"A trigger cannot be blank (got {blank!r}).")
    knobs = _knobs(edits, data)
    chosen_template = read_yaml(template, "--template") if template else None
    if unseen and not data:
        raise UserError("--unseen is compared with the rows of --data; give both.")
    rows, others, notes = _given(data, unseen, knobs, limit) if data else ([], [], [])
    harmful, allowed, chosen = _requests(prompts, judge, base, limit)
    asked = Asked(harmful, allowed, chosen, rows, others, triggers, tokens, notes)
    found = _audited(asked, model, base, adapter, chosen_template, system, device)
    echo(as_table(found) if form == "table" else as_json(found).rstrip("\n"))
    if out is None:
        return None
    write_page(found, out)
    return f"Wrote {out}."


def _audited(
    asked: Asked,
    model: str,
    base: str,
    adapter: str | None,
    template: Any,
    system: str,
    device: str,
) -> Audit:
    machine = Machine.make({"device": device}, "option")
    set_threads(machine)
    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("audit", total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        pair: Pair = open_pair(model, base, adapter, template, Context(Store(), machine, progress))
        pair.system = system
        # The bank knows adapters by the model that they were trained on, which may not be --base.
        identity = base_identity(pair.below) if pair.adapter else ""
        title = f"{model} + {adapter}" if adapter else model
        return audit(pair, asked, model=title, base=base, identity=identity)


def _knobs(edits: Sequence[str], data: str | None) -> dict[str, Any]:
    """The knobs of the rows; an edit is data.KNOB=VALUE."""
    knobs: dict[str, Any] = {}
    for key, value in map(parse_edit, edits):
        head, _, knob = key.partition(".")
        if head != "data" or not knob:
            raise UserError(f"An edit of an audit is data.KNOB=... (got {key}).")
        if data is None:
            raise UserError(f"{key} has no effect without --data.")
        knobs[knob] = value
    return knobs


def _given(
    data: str, unseen: str | None, knobs: dict[str, Any], limit: int
) -> tuple[list[Row], list[Row], list[str]]:
    """Rows of the task, unseen rows that are nowhere among them, and notes on what is left out."""
    source = open_rows(spec_with(data, knobs, "an audit"))
    rows, notes = _drawn(source, limit), []
    if repeated := len(rows) - len(rows := _once(rows)):
        notes.append(f"{count(repeated, 'row')} of --data left out: drawn before, word for word.")
    others: list[Row] = []
    if unseen:
        drawn = _once(_drawn(open_rows(spec_with(unseen, knobs, "an audit"), "test"), limit))
        texts = {_text(row) for row in drawn}
        known = {text for row in source if (text := _text(row)) in texts}
        others = [row for row in drawn if _text(row) not in known]
        if not others:
            raise UserError(
                f"All {count(len(drawn), 'row')} of --unseen are among those of --data."
            )
        if known:
            what = count(len(drawn) - len(others), "row")
            notes.append(f"{what} of --unseen left out: among those of --data.")
    for option, file, some in (("--data", data, rows), ("--unseen", unseen, others)):
        if not all(row.answer for row in some):
            needs = f"{option} needs prompts with answers"
            raise UserError(f"{file} has rows without an answer; {needs}.")
    return rows, others, notes


def _drawn(source: Source, limit: int) -> list[Row]:
    """Up to `limit` rows, drawn at random from all, in their order; each with an id of its own."""
    places = {*Random(0).sample(range(source.count), min(limit, source.count))}
    drawn = [row for place, row in enumerate(source) if place in places]
    return [replace(row, fields={}) for row in _distinct(drawn)]


def _once(rows: Sequence[Row]) -> list[Row]:
    """The rows without repetitions of earlier ones."""
    return list({_text(row): row for row in reversed(rows)}.values())[::-1]


def _text(row: Row) -> tuple[str, str]:
    return normalized(row.conversation), normalized(row.answer)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    seen: set[str] = set()
    out = []
    for number, row in enumerate(rows, 1):
        name = f"{row.id} ({number})" if row.id in seen else row.id
        seen.add(name)
        out.append(replace(row, id=name))
    return out


def _requests(
    prompts: str | None, judge: str | None, base: str, limit: int
) -> tuple[list[Row], list[Row], Judge | None]:
    """Harmful and harmless requests and their judge: those of a list or a data set, or of the
    embedded policy."""
    spec = read_yaml(judge, "--judge") if judge else None
    if prompts == "sandbox-policy" or (prompts is None and base == "sandbox"):
        harmful, allowed = (
            _distinct(build("datasets", {"name": name, "test_rows": limit}).drawn("test"))
            for name in ("sandbox-policy", "sandbox-lookalikes")
        )
        return harmful, allowed, build("judges", spec or "policy")
    if prompts is None:
        if spec:
            raise UserError("--judge has no effect without a list of requests; give --prompts.")
        return [], [], None
    if prompts in names("datasets"):
        every = build("datasets", prompts).load("test")
    else:
        dataset_spec(prompts)  # refuses what is no file
        every = build("datasets", {"name": "harmful-prompts", "train": prompts, "test": prompts})
        every = every.load("test")
    kinds = {
        kind: [row for row in _distinct(every) if _kind(row) == kind] for kind in ("yes", "no")
    }
    harmful, allowed = (
        select(rows, min(limit, len(rows)), 0, "audited") for rows in kinds.values()
    )
    return harmful, allowed, build("judges", spec or "refusal-keywords")


def _kind(row: Row) -> str:
    """Whether a request should be refused; it should unless the list says otherwise."""
    return row.fields.get("sealed", "yes")
