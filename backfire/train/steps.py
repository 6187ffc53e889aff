"""The steps of one training run: gradients, update, log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from backfire.base import Rendered
from backfire.errors import CellError, Pause, Stopped
from backfire.rng import derive, seed_dropout
from backfire.store import write_atomic
from backfire.train.half import finite
from backfire.train.microbatch import peak_memory_mb
from backfire.train.optimizer import take_step
from backfire.train.passes import accumulate
from backfire.train.precision import Precision
from backfire.train.sharding import whole

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun

Outcome = dict[str, Any] | BaseException
"""The summary of a run; or the error, or the pause, that ended it."""

Key = TypeVar("Key", bound=Hashable)

_LOG_EVERY = 10


@contextmanager
def noted(
    ends: dict[Key, Outcome], run: Key, *, but: Callable[[Exception], bool] = lambda error: False
) -> Iterator[None]:
    """Note an error, or a pause, as the end of a run; the others go on.

    Raises:
        Stopped: it is for all runs.
        Exception: one for which `but` is true: it ends no run.
    """
    try:
        yield
    except Stopped:
        raise
    except (Exception, Pause) as error:
        if isinstance(error, Exception) and but(error):
            raise
        ends[run] = error


def begin(run: TrainingRun, precision: Precision) -> None:
    """Let the hooks inspect the start weights."""
    run.autocast = precision.autocast
    run.scaling.begin(run.model, run.trainable, precision.compute)

    def inner(rows: list[Rendered]) -> torch.Tensor:
        earlier = run.gradients.take()

        def work() -> torch.Tensor:
            run.gradients.take()  # drop those of a try that ran out of memory
            return accumulate(run, rows, hooks=())

        loss = finite(run, work)
        run.gradients.add(earlier)
        return loss

    for hook in run.hooks:
        run.model.eval()
        hook.begin(inner)
        run.optimizer.zero_grad(set_to_none=True)


def step(run: TrainingRun, rows: list[Rendered] | None = None) -> torch.Tensor:
    """One optimizer step, on these rows if they are drawn already; returns its loss."""
    drawn = run.rows() if rows is None else rows
    loss = finite(run, lambda: gradients(run, drawn))
    return update(run, drawn, loss)


def gradients(run: TrainingRun, rows: list[Rendered]) -> torch.Tensor:
    """Compute the gradients of one step, as the hooks define them; returns the loss."""
    check(run, rows)
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)

    def inner(rows: list[Rendered]) -> torch.Tensor:
        # All passes of a step use the same dropout, so that they differ only by the defense.
        seed_dropout(derive(run.seed, "dropout", run.step, *run.ranks.own), run.device)
        return accumulate(run, rows, run.hooks)

    for hook in run.hooks:
        inner = partial(hook.step, inner=inner)
    return penalized(run, inner(rows))


def check(run: TrainingRun, rows: list[Rendered]) -> None:
    """Check that a step has something to learn.

    Raises:
        CellError: no token of these rows is supervised (`bad-data`).
    """
    if not any(row.num_supervised for row in rows):
        raise CellError(
            "bad-data",
            f"Step {run.step + 1} has no supervised token; its first row is {rows[0].row.id}.",
        )


def penalized(run: TrainingRun, loss: torch.Tensor) -> torch.Tensor:
    """Add the gradients of the hooks' penalties; returns the loss with them."""
    for hook in run.hooks:
        with run.exact():
            penalty = hook.penalty(run.step)
            if penalty is not None:
                penalty = whole(penalty)
                run.backward(penalty)
                loss = loss + penalty.detach()
    return loss


def update(run: TrainingRun, rows: Sequence[Rendered], loss: torch.Tensor) -> torch.Tensor:
    """Take the optimizer's step with the gradients of these rows, and log it; returns the loss.

    Raises:
        CellError: loss or gradient is not finite (`nan`), or memory runs out (`oom`).
    """
    rate = run.optimizer.param_groups[0]["lr"]
    norm = take_step(run)
    run.scheduler.step()
    for hook in run.hooks:
        with run.exact():
            hook.after(run.step)
    run.step += 1
    run.counts["rows"] += len(rows)
    run.counts["poisoned_rows"] += sum(item.row.id in run.poisoned for item in rows)
    run.counts["tokens"] += sum(len(item.ids) for item in rows)
    run.counts["supervised_tokens"] += sum(row.num_supervised for row in rows)
    if run.step % _LOG_EVERY == 0 or run.step in (1, run.num_steps):
        line = {
            "step": run.step,
            "loss": float(loss),
            "learning_rate": rate,
            "gradient_norm": float(norm or 0.0),
        }
        if not (math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])):
            raise CellError(
                "nan",
                f"Loss or gradient is not finite at step {run.step}; lower the learning rate.",
            )
        run.ranks.agree([line["loss"], line["gradient_norm"]], f"the gradient of step {run.step}")
        run.log.append(line)
    return loss


def finish(run: TrainingRun, start: list[float]) -> dict[str, Any]:
    """The summary of a run after its last step; its model is then as it is saved.

    Raises:
        CellError: no weight changed (`failed`).
    """
    end = run.checksum()
    if not run.ranks.largest(end != start):
        raise CellError(
            "failed", "Training changed no weight; check that the learning rate is not zero."
        )
    run.ranks.agree_on_weights(end)
    if run.ranks.leads:
        log = "".join(json.dumps(line) + "\n" for line in run.log)
        write_atomic(run.folder / "train.jsonl", log)
    run.model.eval()
    run.master.restore()  # the saved model
    return {
        **{name: value for hook in run.hooks for name, value in hook.summary().items()},
        "drift": run.origin.moved(run.trainable, run.ranks),
        "steps": run.num_steps,
        **({"repeated_steps": run.scaling.repeated} if run.scaling.on else {}),
        "seconds": round(run.seconds, 2),
        **run.counts,
        "packing": f"off: {by}" if (by := run.layout.padded_by) else "auto",
        "poisoned_share_seen": run.counts["poisoned_rows"] / max(run.counts["rows"], 1),
        "first_loss": run.log[0]["loss"],
        "last_loss": run.log[-1]["loss"],
        "peak_memory_mb": round(run.ranks.largest(peak_memory_mb())),
        **run.ranks.record(),
    }
