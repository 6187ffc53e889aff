"""Whether this machine has what a run needs, before it takes a job.

What only this machine lacks must not become the failure of a job: no other worker would try it
again. So a worker refuses the run as a whole, in one sentence, with nothing taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from pathlib import Path

from backfire import stages
from backfire.base import Judge
from backfire.commands.plan import sources
from backfire.data.recipe_files import refuse_unread
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Model
from backfire.launch.folder import Plan
from backfire.launch.remote import is_same_cache
from backfire.model.source import adapter_folder, fetch
from backfire.plan import Job
from backfire.store import Store, cache_root, scratch_root, unique


@contextmanager
def where_planned(run: Path, plan: Plan) -> Iterator[Path]:
    """Context in the folder where the run was planned, in which its relative paths begin; in the
    present one if this machine does not have it. Yields the run's folder as seen from there."""
    with ExitStack() as held:
        with suppress(OSError):
            if plan.folder and not Path(plan.folder).samefile(Path.cwd()):
                whole = run.absolute()
                held.enter_context(chdir(plan.folder))
                run = whole
        yield run


def check(run: Path, plan: Plan, left: Sequence[Job]) -> None:
    """Check the cache, the scratch folder, and the inputs of the jobs that are left.

    Raises:
        UserError: this machine lacks something.
    """
    if plan.cache and not is_same_cache(plan.cache):
        raise UserError(
            f"The cache {cache_root()} is not the one with which {run} was planned; set "
            "BACKFIRE_CACHE to that one, which all machines must share, or plan the run again here."
        )
    _check_scratch()
    by_inputs = {_inputs(job.experiment): job for job in left if job.kind == "cell"}
    cells = [job.experiment for job in by_inputs.values()]
    judges = {str(judge.spec()): judge for cell in cells for judge in cell.judges}
    try:
        for model in {str(cell.model.spec()): cell.model for cell in cells}.values():
            _check_model(model)
        for judge in judges.values():
            _check_judge(judge, plan)
        for job in by_inputs.values():
            _check_data(job)
    except (UserError, CellError) as error:
        here = f"This machine cannot work on {run}, as seen from {Path.cwd()}"
        raise UserError(f"{here}: {error}") from None


def _check_scratch() -> None:
    if (scratch := scratch_root()) is None:
        return
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        (file := scratch / f".backfire-{unique()}").touch()
        file.unlink()
    except OSError as error:
        raise UserError(
            f"BACKFIRE_SCRATCH is {scratch}, where nothing can be written ({error.strerror}); set "
            "it to a folder of this machine, or to nothing."
        ) from None


def _inputs(cell: Experiment) -> str:
    """Equal for cells with the same models, data sets and judges."""
    parts = [cell.model, cell.data, cell.align and cell.align.data, cell.safety, *cell.metrics]
    return str([part and part.spec() for part in parts])


def _check_model(model: Model) -> None:
    if model.name != "sandbox":
        fetch(model)
    if model.adapter:
        adapter_folder(model)


def _check_data(job: Job) -> None:
    """The key of a cell tells whether all its files are the same as at the plan."""
    cell = job.experiment
    if stages.cell_key(cell) != job.key:
        raise UserError(
            f"a file of {job.title} differs from that with which it was planned; plan it again, or "
            "let the machines share their files."
        )
    for source, split in sources(cell):
        if getattr(source, "hub", None):
            source.drawn(split)
    if getattr(cell.data, "hub", None) and not Store().done(stages.data(cell)):
        cell.data.drawn("train")


def _check_judge(judge: Judge, plan: Plan) -> None:
    refuse_unread(*vars(judge).values())
    judge.ready()
    host, has_key = judge.reaches() or ("", True)
    if host in plan.keyed and not has_key:
        raise UserError(
            f"judge '{judge.name}' has no key for {host} here, and had one where the run was "
            "planned; set the same variables, or BACKFIRE_ENDPOINTS, as there."
        )
