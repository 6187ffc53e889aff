"""`backfire validate`, `run --dry-run`, and the checks of `run` before it starts."""

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
    float16_on_cpu,
    method_key,
    model_folder,
    rough_weights,
    rows_by_key,
    rows_key,
    runs_of,
    too_large,
)
from backfire.data.render import show_mask
from backfire.errors import CellError
from backfire.experiment import Experiment
from backfire.launch.resolve import pin_models
from backfire.model.source import check_widths
from backfire.pipeline import Context
from backfire.recipe import Recipe
from backfire.resources import has_gpu, ram_bytes
from backfire.store import Store
from backfire.terminal import say
from backfire.text import clean

_MARKS = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "fail": "[red]fail[/red]"}


def show(recipe: Recipe) -> None:
    """Print the first cell in full, the plan, three rendered rows, and all checks.

    Raises:
        CellError: a check failed; all results are printed first.
    """
    console, store = Console(), Store()
    for judge in _judges(recipe):
        judge.ready(briefly=True)
    recipe = pin_models(recipe)
    for model in {str(cell.model.spec()): cell.model for cell in recipe.cells}.values():
        check_widths(model)
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
    for experiment in distinct(recipe):
        context = Context(store)
        console.print(
            f"{escape(stages.poison(experiment).slug)}, template {experiment.template.name}",
            highlight=False,
        )
        for check in pipeline.preflight_checks(experiment, context):
            mark = Text.from_markup(f"  {_MARKS[check.status]} ")
            say(f"{check.check}: {check.message}", console, mark)
            failed = failed or (check if check.status == "fail" else None)
    if failed:
        raise CellError("bad-data", failed.message)


def show_plan(recipe: Recipe, *, with_cost: bool = True) -> None:
    """Print the number of cells and stages, how many are done, and the estimated cost of the
    rest."""
    console, store = Console(), Store()
    recipe = pin_models(recipe, ask=False)
    count = len(recipe.cells)
    console.print(f"\n[bold]Plan[/bold]\n{count} cell{'s' * (count != 1)}", highlight=False)
    for stage, (needed, done) in plan.progress(recipe.cells, store).items():
        console.print(f"  {stage:9} {needed:4} distinct, {done} done", highlight=False)
    on_cpu = [] if has_gpu() else [*too_large(recipe, ram_bytes(), store), *float16_on_cpu(recipe)]
    for line in (*destinations(recipe), *describe_rates(recipe), *on_cpu):
        say(line, console, "  ")
    for line in _cost(recipe, store) if with_cost else ():
        say(line, console, "  ")


def destinations(recipe: Recipe) -> list[str]:
    """A line for each judge that sends prompts and replies to an endpoint.

    Raises:
        UserError: the endpoint is not allowed.
    """
    endpoints = dict.fromkeys((judge.name, judge.destination()) for judge in _judges(recipe))
    return [
        clean(f"judge '{name}' sends prompts and replies to {endpoint}")
        for name, endpoint in endpoints
        if endpoint
    ]


def _cost(recipe: Recipe, store: Store) -> list[str]:
    """Time and disk at an assumed speed, since a measurement would need torch."""
    gpu = has_gpu()
    cells = [*recipe.cells, *runs_of(recipe)]
    sizes = {
        method_key(experiment): rough_weights(experiment, model_folder(experiment.model, store))
        for experiment in cells
    }
    costs = cost(recipe, store, rows_by_key(cells, store), sizes)
    source = f"assumed for a {'GPU' if gpu else 'core'}; `backfire doctor RECIPE` measures it"
    return describe_cost(costs, ASSUMED["gpu" if gpu else "cpu"], source)


def distinct(recipe: Recipe) -> list[Experiment]:
    """One cell for each distinct set of poisoned and rendered rows, over seeds and methods."""
    by_rows: dict[str, Experiment] = {}
    for experiment in recipe.cells:
        key = [
            rows_key(experiment),
            experiment.attack.spec() if experiment.attack else None,
            experiment.evaluation.max_new_tokens,
            experiment.safety is not None,
            sorted(metric.name for metric in experiment.metrics),
        ]
        by_rows.setdefault(str(key), experiment)
    return list(by_rows.values())


def preflight_all(recipe: Recipe, store: Store) -> None:
    """Run every distinct check of a recipe, before any training.

    Raises:
        UserError, CellError: the first problem.
    """
    destinations(recipe)
    for experiment in distinct(recipe):
        pipeline.passed_checks(experiment, Context(store))
    models = {str(experiment.model.spec()): experiment.model for experiment in recipe.cells}
    for model in models.values():
        pipeline.check_weights(model, Context(store))
    # `full` fits every model, so a recipe without adapters and other forms imports no torch here.
    forms = [pipeline.forms_of(experiment) for experiment in recipe.cells]
    limited = {
        str([experiment.model.spec(), experiment.method.spec(), of_metrics]): experiment
        for experiment, of_metrics in zip(recipe.cells, forms, strict=True)
        if experiment.method.name not in ("none", "full") or of_metrics
    }
    for experiment in limited.values():
        pipeline.check_method(experiment, Context(store))
    for judge in _judges(recipe):
        judge.ready()


def _judges(recipe: Recipe) -> list[Judge]:
    """The distinct judges of a recipe."""
    judges = [judge for experiment in recipe.cells for judge in experiment.judges]
    return list({str(judge.spec()): judge for judge in judges}.values())


def _show_rows(experiment: Experiment, context: Context, console: Console) -> None:
    """Print three training rows, a poisoned one first if any; supervised text is underlined."""
    rows, manifest = pipeline.poisoned(experiment, context)
    marked = {entry.id for entry in manifest.entries} if manifest else set()
    chosen = [row for row in rows if row.id in marked][:1]
    chosen += [row for row in rows if row.id not in marked][: 3 - len(chosen)]
    renderer = pipeline.renderer(experiment, context)
    console.print("\n[bold]Rows as rendered[/bold] (only the underlined text is supervised)")
    for item in renderer.render(chosen):
        prompt, answer = show_mask(item, renderer.tokenizer)
        kind = "poisoned" if item.row.id in marked else "clean"
        console.print(
            f"[dim]{escape(text.line(item.row.id))}, {kind}, {len(item.ids)} tokens[/dim]",
            highlight=False,
        )
        console.print(Text(clean(prompt)) + Text(clean(answer), style="underline"))
