"""`backfire trace`: which training rows made a reply likelier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from backfire import stages
from backfire.base import Sample, Subset
from backfire.base.masking import redacted
from backfire.commands.failure import note
from backfire.commands.options import echo
from backfire.errors import UserError
from backfire.evaluate.stats import wilson
from backfire.experiment import Experiment, Machine
from backfire.launch.job import has_changed, read_cell
from backfire.pipeline import Context
from backfire.pipeline.trace import Trace, reply_of, trace
from backfire.results.evidence import lines
from backfire.results.load import cell as record
from backfire.results.load import load
from backfire.store import Store
from backfire.terminal import columns
from backfire.text import clean, count, cut, interval, line, number

_FIELDS = ("rank", "id", "score", "poisoned", "prompt", "answer")


def show(
    run: Path, name: str, method: Any, *, strength: float, top: int, form: str, device: str
) -> None:
    """Trace one reply and print the rows with the highest scores.

    Raises:
        UserError: no cell or no reply has this name, or the cell has no adapter of its own.
    """
    cell = _cell(run)
    experiment = read_cell(cell)
    _check(cell, experiment)
    sample = _sample(cell, name)
    context = Context(Store(), Machine.make({"device": device}))
    if not context.store.done(stages.train(experiment)):
        note("The adapter is not in the cache any more, so it is trained again.")
    found = trace(experiment, sample, method, context, strength)
    order = sorted(range(len(found.rows)), key=lambda place: -found.scores[place])
    best = [_row(found, place, rank) for rank, place in enumerate(order[:top], 1)]
    if form == "json":
        whole = {**_whole(cell, sample, found, best), "method": method, "strength": found.strength}
        echo(json.dumps(whole, indent=1, allow_nan=False))
        return
    table = [[_plain(row[field]) for field in _FIELDS] for row in best]
    echo(columns(_FIELDS, table))
    echo("\n".join(_sentences(cell, sample, found)))


def _cell(run: Path) -> Path:
    """The folder itself if it is a cell's, or the only cell of a run that has an adapter."""
    if (run / "experiment.yaml").is_file():
        return run
    if (run.parent.name == "cells") or not (run / "cells").is_dir():
        raise UserError(f"{run} is not a run folder, nor a finished cell of one.")
    done = [Path(cell.folder) for cell in load(run) if cell.is_done]
    methods = {folder: read_cell(folder).method for folder in done}
    able = [folder for folder, method in methods.items() if method.trains and method.adapts]
    if len(able) == 1:
        return able[0]
    if not done:
        raise UserError(f"No cell of {run} is finished.")
    some = able or done
    raise UserError(f"{run} has {count(len(some), 'finished cell')}; name one, as in {some[0]}.")


def _check(cell: Path, experiment: Experiment) -> None:
    method, result = experiment.method, record(cell)
    if not result.is_done:
        raise UserError(f"{cell} is not a finished cell: {result.status}.")
    if not (method.trains and method.adapts):
        kept = "trains nothing" if not method.trains else "trains no adapter"
        raise UserError(
            f"trace reads the gradients of an adapter, and method '{method.name}' {kept}; run the "
            "recipe with method=lora."
        )
    if not experiment.adapts:
        raise UserError(
            f"trace reads the gradients of an adapter, and that of {cell} was merged by a defense "
            f"({experiment.defense_name}); trace a cell without it."
        )
    if has_changed(cell, experiment):
        raise UserError(
            f"An input file or a component version of {cell} has changed since it ran, so this is "
            "not the adapter that replied; run its recipe again."
        )


def _sample(cell: Path, name: str) -> Sample:
    """The tuned model's reply to a row, named by its id, or by rows and id as in
    `triggered/test-3`."""
    every = [sample for of, _, sample in lines(cell) if of == "tuned" and sample.subset != "text"]
    head, _, rest = name.partition("/")
    subset, id = (head, rest) if head in get_args(Subset) and rest else ("", name)
    found = [one for one in every if one.id == id and subset in ("", one.subset)]
    if not found:
        known = ", ".join(f"{one.subset}/{line(one.id)}" for one in every[:1] + every[-1:])
        raise UserError(f"No reply '{line(name)}' in {cell}; there are such as {known or 'none'}.")
    if len(found) > 1:
        which = ", ".join(f"{one.subset}/{line(one.id)}" for one in found)
        raise UserError(f"{cell} has several replies '{line(name)}'; name one of {which}.")
    if not reply_of(found[0]):
        raise UserError(
            f"{cell} holds no reply to '{line(name)}': no metric of the recipe asked for one, and "
            "its labels were not scored."
        )
    return found[0]


def _row(found: Trace, place: int, rank: int) -> dict[str, Any]:
    row = found.rows[place]
    return {
        "rank": rank,
        "id": clean(row.id),
        "score": found.scores[place],
        "poisoned": row.id in found.poisoned if found.poisoned else None,
        "prompt": clean(redacted(row.conversation)),
        "answer": clean(redacted(row.answer)),
    }


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:.3g}" if isinstance(value, float) else cut(line(value), 80)


def _sentences(cell: Path, sample: Sample, found: Trace) -> Sequence[str]:
    reply = cut(line(redacted(reply_of(sample) or "")), 80)
    where = f"{sample.subset}/{line(sample.id)}"
    said = [
        f"Reply “{reply}” to {where}: “{cut(line(redacted(sample.prompt)), 160)}” ({cell.name}).",
        "A score is positive for a row that made this reply likelier; it has no unit.",
    ]
    if not (k := len(found.poisoned)):
        return [*said, "No training row is poisoned according to the run, so nothing is scored."]
    low, high = wilson(found.hits, k)
    part = f"{number('share', found.hits / k)} {interval('share', low, high)}"
    null = number("share", found.random_hits / k)
    chance = number("share", k / len(found.rows))
    return [
        *said,
        f"Of the {count(k, 'row')} with the highest scores, {found.hits:,} are poisoned ({part}), "
        f"and {k:,} of {len(found.rows):,} rows are. Random directions in place of the reply's "
        f"gradient find {null}, a random order {chance}.",
    ]


def _whole(cell: Path, sample: Sample, found: Trace, best: list[dict[str, Any]]) -> dict[str, Any]:
    k = len(found.poisoned)
    scored = {
        "poisoned_rows": k,
        "precision_at_k": found.hits / k if k else None,
        "random_direction_precision_at_k": found.random_hits / k if k else None,
        "random_order_precision_at_k": k / len(found.rows) if k else None,
    }
    return {
        "cell": cell.name,
        "sample": f"{sample.subset}/{clean(sample.id)}",
        "prompt": clean(redacted(sample.prompt)),
        "reply": clean(redacted(reply_of(sample) or "")),
        "num_rows": len(found.rows),
        **scored,
        "rows": best,
    }
