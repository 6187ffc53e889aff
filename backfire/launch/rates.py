"""The learning rates of a recipe, which follow the size of the base where it names none."""

from __future__ import annotations

from backfire.base import LARGE
from backfire.experiment import Experiment
from backfire.launch.cost import runs_of
from backfire.model.count import num_weights
from backfire.recipe import Recipe

_FAR = 5  # times the usual rate; who sweeps rates may go further on purpose, so it is only said


def said(recipe: Recipe) -> list[str]:
    """Each method's rate and how large the bases are; then those that are far above the usual one
    of a large base."""
    runs = runs_of(recipe)
    found = dict.fromkeys(f"{run.method.name} {run.learning_rate:g}" for run in runs)
    bases = dict.fromkeys(_size(run) for run in runs)
    line = f"learning rate: {', '.join(found)} (base: {', '.join(bases)})"
    return [line, *too_high(recipe)] if found else []


def too_high(recipe: Recipe) -> list[str]:
    """A sentence for each named rate that is far above the usual one of a large base."""
    out = dict[str, None]()
    for run in runs_of(recipe):
        usual, named = run.method.rates[1], run.method.learning_rate
        if named and named > _FAR * usual and (num_weights(run.model) or 0) >= LARGE:
            out[
                f"{run.method.label()}: learning_rate={named:g} is {named / usual:.0f} times what "
                f"is usual for a base of {_size(run)} ({usual:g}); null would be that."
            ] = None
    return list(out)


def _size(run: Experiment) -> str:
    count = num_weights(run.model)
    return "unknown size, taken as large" if count is None else f"{count / 1e6:,.3g} M weights"
