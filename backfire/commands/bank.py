"""`backfire bank`: adapters whose past is known, for audits to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from backfire import pipeline, terminal, text
from backfire.audit import bank
from backfire.base import ReplyDefense
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.launch.job import read_cell
from backfire.model.source import pin
from backfire.pipeline import Context
from backfire.playground.models import NotCachedError, ReadOnlyStore
from backfire.results.load import load
from backfire.store import Store, digest


def add_run(run: Path) -> str:
    """Add the LoRA adapters of a run's finished cells and of their clean twins; returns what was
    added.

    Raises:
        UserError: it is no run, or no cell has such an adapter.
    """
    cells = [Path(cell.folder) for cell in load(run) if cell.is_done]
    context = Context(ReadOnlyStore(Store().root), Machine())
    new = known = gone = 0
    other: Counter[str] = Counter()
    for experiment in _distinct(cells):
        if why := _why_not(experiment):
            other[why] += 1
            continue
        try:
            folder, base = pipeline.tuned(experiment, context), pipeline.start(experiment, context)
        except NotCachedError:
            gone += 1
            continue
        identity = _identity(experiment, base.base)
        recipe = {**experiment.spec(), "defense": "none"}
        for key in ("metrics", "evaluation", "safety"):
            recipe.pop(key)
        clean = not (experiment.poisons or experiment.data.poisoned)
        if bank.add(bank.entry_of(folder, identity, clean=clean, recipe=recipe)):
            new += 1
        else:
            known += 1
    if not new + known:
        reasons = text.listing([*other, *(["no longer in the cache"] if gone else [])])
        raise UserError(f"{run} has no adapter for the bank: {reasons or 'no finished cell'}.")
    left = [f"{n} left out: {why}" for why, n in other.items()]
    left += [f"{gone} no longer in the cache"] if gone else []
    left += [f"{known} were there"] if known else []
    parts = [f"{text.count(new, 'adapter')} added to {bank.bank_root()}", *left]
    return (
        "; ".join(parts) + ". Those of recipes without an attack, on data that is not known to be "
        "poisoned, count as clean: add only runs on rows that you trust."
    )


def _distinct(cells: list[Path]) -> Iterator[Experiment]:
    """The experiments of these cells and their clean twins, each once."""
    seen: set[str] = set()
    for cell in cells:
        experiment = read_cell(cell)
        twins = [experiment.clean_twin()] if experiment.attack else []
        for one in [*([experiment] if experiment.poisons else []), *twins, experiment.clean_twin()]:
            key = digest([one.spec() | {"metrics": []}])
            if key not in seen:
                seen.add(key)
                yield one


def _why_not(experiment: Experiment) -> str:
    """Why its model is not for the bank; empty if it is."""
    method = experiment.method
    if not method.trains or not method.adapts or not method.stacks:
        return f"method {method.name} makes no LoRA adapter"
    if not experiment.adapts:
        return "its adapter was merged by a defense"
    # A guard leaves the adapter as it is, and a defense of the alignment is part of its base.
    if named := [one.name for one in experiment.acting if not isinstance(one, ReplyDefense)]:
        return f"trained under a defense ({', '.join(named)})"
    stays = experiment.align and experiment.align.method.adapts and not experiment.align.merge
    if stays or experiment.model.is_adapted:
        return "on top of another adapter"
    return ""


def _identity(experiment: Experiment, base: Path) -> str:
    """The identity of the model that it was tuned from: the base, or the aligned model."""
    if experiment.align is None and not experiment.model.merge:
        return bank.base_identity(pin(experiment.model, ask=False))
    return bank.base_identity(
        experiment.model.model_copy(
            update={
                "name": str(base),
                "revision": None,
                "gguf_file": None,
                "adapter": None,
                "adapter_revision": None,
                "merge": False,
            }
        )
    )


def show() -> None:
    """Print the adapters of the bank, by base, settings and data."""
    every = list(bank.entries())
    groups = Counter((one.base_title, one.shape.title, one.title, one.clean) for one in every)
    if not every:
        terminal.say(f"No adapters in {bank.bank_root()}; add those of a run: bank add RUN.")
        return
    rows = [
        [f"{n:,}", "clean" if clean else "attacked", what, shape, text.cut(base, 40)]
        for (base, shape, what, clean), n in sorted(groups.items())
    ]
    terminal.put(("n", "", "data", "settings", "base"), rows, right=(0,))
    terminal.say(f"{text.count(len(every), 'adapter')} in {bank.bank_root()}.")
