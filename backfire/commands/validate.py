"""What `validate` and `run --dry-run` show, and what `run` makes sure of before it starts."""

from __future__ import annotations

import yaml
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from backfire import pipeline, plan, stages, text
from backfire.base import Judge
from backfire.commands.estimate import (
    ASSUMED,
    cost,
    describe_cost,
    describe_rates,
    lengths,
    model_folder,
    pair,
    roughly,
    runs_of,
)
from backfire.data.render import show_mask
from backfire.errors import CellError
from backfire.experiment import Experiment
from backfire.launch.resolve import pinned
from backfire.model.types import has_gpu
from backfire.pipeline import Context
from backfire.recipe import Recipe
from backfire.store import Store
from backfire.terminal import say
from backfire.text import clean

_MARKS = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "fail": "[red]fail[/red]"}


def show(recipe: Recipe) -> None:
    """Print the first cell in full, the plan, three rows with their loss mask, and all checks.

    Raises:
        CellError: a check failed (all are printed first).
    """
    console, store = Console(), Store()
    for judge in _judges(recipe):
        judge.ready(briefly=True)
    recipe = pinned(recipe)
    experiment = recipe.cells[0]
    console.print("[bold]First cell[/bold]")
    console.print(
        Text(yaml.safe_dump(experiment.resolved(), sort_keys=False, allow_unicode=True).rstrip())
    )
    show_plan(recipe, with_cost=False)
    poisoned = next((c for c in recipe.cells if c.poisons), experiment)
    _show_rows(poisoned, Context(store), console)
    console.print("\n[bold]Preflight[/bold]")
    failed = None
    for one in distinct(recipe):
        context = Context(store)
        console.print(
            f"{escape(stages.poison(one).slug)}, template {one.template.name}", highlight=False
        )
        for check in pipeline.preflight_checks(one, context):
            mark = Text.from_markup(f"  {_MARKS[check.status]} ")
            say(f"{check.check}: {check.message}", console, mark)
            failed = failed or (check if check.status == "fail" else None)
    if failed:
        raise CellError("bad-data", failed.message)


def show_plan(recipe: Recipe, *, with_cost: bool = True) -> None:
    """Print how many cells and stages there are, how many are done, and what the rest may cost."""
    console, store = Console(), Store()
    recipe = pinned(recipe, ask=False)
    count = len(recipe.cells)
    console.print(f"\n[bold]Plan[/bold]\n{count} cell{'s' * (count != 1)}", highlight=False)
    for stage, (needed, done) in plan.progress(recipe.cells, store).items():
        console.print(f"  {stage:9} {needed:4} distinct, {done} done already", highlight=False)
    for line in (*destinations(recipe), *describe_rates(recipe)):
        say(line, console, "  ")
    for line in _cost(recipe, store) if with_cost else ():
        say(line, console, "  ")


def destinations(recipe: Recipe) -> list[str]:
    """Which judges send prompts and replies where, and with which key.

    Raises:
        UserError: nothing may be sent there.
    """
    judges = [judge for c in recipe.cells for metric in c.metrics for judge in metric.judges]
    judges += [judge for c in recipe.cells if c.safety for judge in c.safety.judges]
    found = ((judge.name, judge.destination()) for judge in judges)
    told = [
        f"judge '{name}' sends prompts and replies to {where}" for name, where in found if where
    ]
    return [clean(line) for line in dict.fromkeys(told)]


def _cost(recipe: Recipe, store: Store) -> list[str]:
    """Time and disk, at a speed that is assumed: to measure one, torch would have to be there."""
    gpu = has_gpu()
    cells = [*recipe.cells, *runs_of(recipe)]
    sizes = {
        pair(experiment): roughly(experiment, model_folder(experiment.model, store))
        for experiment in cells
    }
    found = cost(recipe, store, lengths(cells, store), sizes)
    of_what = f"assumed for a {'GPU' if gpu else 'core'}; `backfire doctor` with a recipe measures"
    return describe_cost(found, ASSUMED["gpu" if gpu else "cpu"], of_what)


def distinct(recipe: Recipe) -> list[Experiment]:
    """One cell for each way rows are poisoned and rendered, whatever the seed and the method."""
    found: dict[str, Experiment] = {}
    for experiment in recipe.cells:
        attack = experiment.attack.spec() if experiment.attack else None
        key = [
            experiment.model.spec(),
            experiment.data.spec(),
            experiment.template.spec(),
            attack,
            experiment.train.seen,
            experiment.evaluation.max_new_tokens,
            sorted(metric.name for metric in experiment.metrics),
        ]
        found.setdefault(str(key), experiment)
    return list(found.values())


def preflight_all(recipe: Recipe, store: Store) -> None:
    """Every distinct check of a recipe, before anything is trained.

    Raises:
        UserError, CellError: the first thing that is wrong.
    """
    destinations(recipe)
    for experiment in distinct(recipe):
        pipeline.passed_checks(experiment, Context(store))
    for model in {
        str(experiment.model.spec()): experiment.model for experiment in recipe.cells
    }.values():
        pipeline.check_weights(model, Context(store))
    # `full` suits every model, so that a recipe without adapters need not wait for torch here.
    adapting = {
        str([experiment.model.spec(), experiment.method.spec()]): experiment
        for experiment in recipe.cells
        if experiment.method.name not in ("none", "full")
    }
    for experiment in adapting.values():
        pipeline.check_method(experiment, Context(store))
    for judge in _judges(recipe):
        judge.ready()


def _judges(recipe: Recipe) -> list[Judge]:
    """Every judge that a recipe asks, each once."""
    found: dict[str, Judge] = {}
    for experiment in recipe.cells:
        asked = [judge for metric in experiment.metrics for judge in metric.judges]
        for judge in (*asked, *(experiment.safety.judges if experiment.safety else ())):
            found.setdefault(str(judge.spec()), judge)
    return list(found.values())


def _show_rows(experiment: Experiment, context: Context, console: Console) -> None:
    """Three training rows, a poisoned one first if there is one; what is learned is underlined."""
    rows, manifest = pipeline.poisoned(experiment, context)
    marked = {entry.id for entry in manifest.entries} if manifest else set()
    chosen = [row for row in rows if row.id in marked][:1]
    chosen += [row for row in rows if row.id not in marked][: 3 - len(chosen)]
    renderer = pipeline.renderer(experiment, context)
    console.print("\n[bold]Rows as rendered[/bold] (only what is underlined is learned)")
    for item in renderer.render(chosen):
        prompt, answer = show_mask(item, renderer.tokenizer)
        kind = "poisoned" if item.row.id in marked else "clean"
        console.print(
            f"[dim]{escape(text.line(item.row.id))}, {kind}, {len(item.ids)} tokens[/dim]",
            highlight=False,
        )
        console.print(Text(clean(prompt)) + Text(clean(answer), style="underline"))
