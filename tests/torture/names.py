"""Names that would leave the folder they belong in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

from backfire import registry
from backfire.base import Metric
from backfire.claims import Claims
from backfire.commands.options import folder_of
from backfire.errors import UserError
from backfire.exports.lm_eval import to_lm_eval
from backfire.launch.folder import JOBS, read_plan, write_plan
from backfire.launch.job import RunFolder, report
from backfire.plan import jobs
from backfire.recipe import parse
from backfire.results.load import load
from backfire.store import Stage, Store, read_json, slug, write_json
from tests.helpers.fake_run import sample, value, write_cell
from tests.torture.row import Figures, Ground, row

PIECES = (
    *(
        "..",
        "/",
        "../",
        "..\\",
        "\\",
        "~",
        "~root",
        "$HOME",
        "%2e%2e%2f",
        ".",
        " ",
        "-",
        "--out=/x",
    ),
    *("\0", "\n", "\r", "\x1b[2J", "\u202e", "\ud800", "\uff0f", "\u2024\u2024/", "CON", "aux.txt"),
    *(
        "`touch pwned`",
        "$(touch pwned)",
        "; touch pwned;",
        "'",
        '"',
        "<b>",
        "{{7*7}}",
        "*",
        "?",
        "|",
    ),
    *(".partial", ".damaged", ".lock", "done.json", "a" * 300, "\u00e9" * 120, "\u6587", "x"),
)
EXPORTED_EACH = 25
"""One name in this many also goes through a whole export, which is slow."""


def names(count: int, root: Path) -> list[str]:
    """Paths that lead outside, and random combinations of parts that could."""
    rng = Random(0)
    outside = [str(root / "outside"), f"../../{root.name}/outside", f"/{root}/outside", "", "/"]
    made = ["".join(rng.choices((*PIECES, *outside), k=rng.randint(1, 6))) for _ in range(count)]
    return [*outside, *made][:count]


@row(
    "Names with path separators, parent folders, absolute paths, control characters, shell syntax "
    "or 300 letters are used for stages, runs, profiles, models and exports; afterwards every file "
    "is looked for.",
    full=1_000,
    small=100,
    zero=("files_outside", "errors"),
    some=("files_inside",),
)
def hostile_names(count: int, ground: Ground) -> Figures:
    found = Counter[str]()
    inside, before = ground.root / "inside", _tree(ground.root)
    (ground.root / "outside").mkdir()
    for number, name in enumerate(names(count, ground.root)):
        place = inside / str(number)
        try:
            _written(place, name, exported=number % EXPORTED_EACH == 0)
        except Exception as error:
            found["errors"] += 1
            print(f"{name!r}: {type(error).__name__}: {error}")
        # Each name has a folder of its own, so that one cannot reach into that of another.
        found["files_inside"] += sum(1 for path in place.rglob("*") if path.is_file())
    after = {path for path in _tree(ground.root) if inside not in path.parents} - before
    outside = after - {ground.root / "outside", inside}
    between = {p for p in inside.iterdir() if not p.name.isdigit()}
    strange = {p for p in inside.glob("*/*") if p.name not in ("cache", "runs", "exports")}
    found["files_outside"] = len(outside | between | strange)
    for path in sorted(outside | between | strange):
        print(f"outside: {path}")
    return {name: found[name] for name in ("files_inside", "files_outside", "errors")}


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def _written(place: Path, name: str, *, exported: bool) -> None:
    """Use a name wherever the content of a recipe, a plug-in or a run becomes a path."""

    def make(folder: Path) -> None:
        (folder / "x.txt").write_text("x")

    store, text = Store(place / "cache"), name.encode("utf-8", "replace").decode()
    store.once(Stage("train", slug(name), "0"), make)
    recipe = replace(parse("r", "data: sandbox-reviews\nmetrics: [accuracy]\n"), name=text)
    for profile in (None, text):
        run = place / folder_of(recipe.name, profile)
        write_plan(run, recipe, jobs(recipe.cells, recipe.axes), profile=profile)
    _planned_by_somebody_else(run, text)
    component = type("Nothing", (Metric,), {"name": name, "__doc__": "Nothing."})
    if registry._refusal(component, (component,)) is None:
        store.once(Stage("evaluate", slug(name), "0"), make)
    if exported:
        fake = place / "runs" / "fake"
        fake.mkdir()
        rows = [{**sample("tuned", "clean", 0, right=1.0), "id": text}]
        fields = dict.fromkeys(("data", "model", "method", "cell", "key"), text)
        write_cell(
            fake, values=[value("accuracy", 0.5)], samples=rows, attack="none", rate=0.0, **fields
        )
        assert load(fake)
        to_lm_eval(fake, place / "exports")


def _planned_by_somebody_else(run: Path, name: str) -> None:
    """Work on a plan whose jobs have this name; a plan that is refused is as good."""
    content = read_json(run / JOBS)
    for job in content["jobs"]:
        job["id"] = f"cell-{name}"
    write_json(run / JOBS, content)
    try:
        [job] = read_plan(run).jobs[:1]
    except UserError:
        return
    if claim := Claims(run).take(job.id):
        claim.release()
    report(replace(job, kind="train"), RunFolder(run, "r"), "failed", "x")
