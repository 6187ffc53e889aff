"""The training loop: a list of training runs on one device, stepped in turn.

A `TrainingRun` owns everything of its own: rows in their order, trainable weights, optimizer,
random streams, log. Nothing here reaches for "the" model or a global step. With one run it is an
ordinary loop.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from backfire.base import Rendered, TrainDefense, TrainHook
from backfire.errors import CellError
from backfire.experiment import Train
from backfire.model.batching import drops, ways
from backfire.model.load import weights_of
from backfire.progress import Progress, silent
from backfire.rng import derive, stream
from backfire.store import write_atomic
from backfire.train import checkpoint
from backfire.train.batches import answer_logits, at_answers, collate, token_losses
from backfire.train.drift import Origin
from backfire.train.gradients import Gradients
from backfire.train.microbatch import (
    Room,
    peak_memory_mb,
    recompute_layers,
    refuse_hooks,
    tried_again,
)
from backfire.train.optimizer import optimization, steps_taken, unmoved

_LOG_EVERY = 10
_WINDOW = 50  # steps whose rows are sorted together, as transformers does


class TrainingRun:
    """One model being tuned."""

    def __init__(
        self,
        model: PreTrainedModel,
        items: Sequence[Rendered],
        train: Train,
        *,
        learning_rate: float,
        seed: int,
        folder: Path,
        name: str,
        poisoned: frozenset[str] = frozenset(),
        paged: bool = False,
        defenses: Sequence[TrainDefense] = (),
        aligned: Sequence[Rendered] = (),
        harmful: Sequence[Rendered] = (),
        unaligned: Path | None = None,
        start: Path | None = None,
        recompute: bool = False,
    ) -> None:
        self.model, self.items, self.train = model, items, train
        self.aligned, self.harmful, self.unaligned = aligned, harmful, unaligned
        self.seed, self.folder, self.name, self.poisoned = seed, folder, name, poisoned
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.gradients = Gradients(self.trainable, seed)
        if not self.trainable:
            raise CellError("failed", "Nothing to train: no weight of the model is trainable.")
        self.origin = Origin(self.trainable, start)
        self.steps_per_epoch = math.ceil(len(items) / train.batch_size)
        self.num_steps = train.max_steps or math.ceil(train.epochs * self.steps_per_epoch)
        self.optimizer, self.scheduler = optimization(
            model, self.trainable, train, learning_rate, self.num_steps, paged=paged
        )
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.hooks = [defense.hook(self) for defense in defenses]
        # Sharing a prefix between rows would also share its dropout.
        allowed = ways(model).goes_on and not drops(model)
        self.share = allowed and all(hook.shares_prefix for hook in self.hooks)
        if recompute:  # a layer that is run again would lack the keys and values of a shared prefix
            self.share = False
            recompute_layers(model)
        self.room, self.recompute, self.recomputing = Room(), recompute, False
        self._epoch, self._steps = -1, list[list[Rendered]]()
        self.step = 0
        self.seconds, self.begun = 0.0, 0.0  # before the last checkpoint; the clock less that
        self.log: list[dict[str, float]] = []
        self.counts = {"rows": 0, "poisoned_rows": 0, "tokens": 0, "supervised_tokens": 0}

    def go_to(self, step: int, log: list[dict[str, float]], counts: dict[str, int]) -> None:
        """Continue after `step` steps; the optimizer's state has been loaded."""
        self.step, self.log, self.counts = step, log, counts
        self.scheduler.last_epoch = step
        for group, rate in zip(self.optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate

    def _rates(self, step: int) -> list[float]:
        scheduler: Any = self.scheduler
        return [
            base * f(step) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]

    def rows(self) -> list[Rendered]:
        """The rows of the current step: a fresh order every epoch, from a stream of its own."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._steps = epoch, self._order(epoch)
        rows = self._steps[place]
        for hook in self.hooks:
            rows = hook.rows(self.step, rows)
        return rows

    def draw(self, rows: Sequence[Rendered], step: int, purpose: str) -> list[Rendered]:
        """A batch of other rows for a step: each pass in a fresh order, begun again at the end."""
        size = min(self.train.batch_size, len(rows))
        per_pass = math.ceil(len(rows) / size)  # the last batch of a pass may be smaller
        turn, place = divmod(step, per_pass)
        order = list(range(len(rows)))
        stream(self.seed, purpose, turn).shuffle(order)
        return [rows[i] for i in order[place * size : (place + 1) * size]]

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable weights as they are now."""
        return {name: p.detach().clone() for name, p in self.trainable.items()}

    @contextlib.contextmanager
    def at(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with these trainable weights in place of its own, to look at: without dropout
        and without gradients. It takes no second copy of what is frozen."""
        own, training = {name: p.data for name, p in self.trainable.items()}, self.model.training
        cached = torch.is_autocast_cache_enabled()
        # Else autocast would go on computing with its bfloat16 copies of the weights taken out.
        torch.set_autocast_cache_enabled(False)
        try:
            for name, parameter in self.trainable.items():
                parameter.data = weights[name]
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self.trainable.items():
                parameter.data = own[name]
            self.model.train(training)
            torch.set_autocast_cache_enabled(cached)

    def logits(self, rows: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [row, answer, vocab] of the answers' tokens, and the tokens [row, answer]."""
        device = next(iter(self.trainable.values())).device
        batch = collate(rows, share=self.share).to(device)
        with self.autocast():
            return answer_logits(self.model, batch), batch.labels

    at_answers = staticmethod(at_answers)

    def unaligned_weights(self) -> dict[str, torch.Tensor]:
        """Weights before the alignment stage, by the plain model's names; empty without one."""
        return weights_of(self.unaligned) if self.unaligned else {}

    def _order(self, epoch: int) -> list[list[Rendered]]:
        """The steps of an epoch, each a list of rows."""
        rng, size = stream(self.seed, "order", epoch), self.train.batch_size
        rows = list(self.items)
        rng.shuffle(rows)
        if self.train.order == "by-length":
            window = _WINDOW * size
            windows = [rows[i : i + window] for i in range(0, len(rows), window)]
            rows = [row for part in windows for row in sorted(part, key=lambda r: -len(r.ids))]
        steps = [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.train.order == "by-length":
            rng.shuffle(steps)
        return steps

    def backward(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Add to the weights' gradients those of a loss, or of tensors whose own gradients are
        known. While it runs, `recomputing` is true: what hooks see are modules run once more."""
        if self.recompute:
            refuse_hooks(self.model, self.hooks)
        self.recomputing = True
        try:
            torch.autograd.backward(tensors, gradients)
        finally:
            self.recomputing = False

    def close(self) -> None:
        """Let go of the model: guards and the run hold each other, and so do an optimizer and its
        schedule. Without a cycle the memory is free at once."""
        self.optimizer.param_groups.clear()
        self.optimizer.state.clear()
        self.hooks, self.trainable, self.autocast = [], {}, contextlib.nullcontext
        self.gradients.weights = {}
        del self.model, self.optimizer, self.scheduler, self.origin

    def checksum(self) -> list[float]:
        """Moves if any trainable weight moves."""
        with torch.no_grad():
            # Neither makes a copy in double precision.
            return [
                p.sum(dtype=torch.float64).item()
                + torch.linalg.vector_norm(p, 1, dtype=torch.float64).item()
                for p in self.trainable.values()
            ]


def train(
    runs: Sequence[TrainingRun],
    accelerator: Accelerator,
    *,
    micro_batch: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train every run to its end and return a summary of each.

    Raises:
        CellError: loss or gradient is not finite (`nan`), a step supervises no token (`bad-data`),
            memory runs out at one row (`oom`), or the weights did not move (`failed`).
    """
    start = [run.checksum() for run in runs]
    for run in runs:
        run.room.rows = micro_batch
        _begin(run, accelerator)
        checkpoint.restore(run, lambda text: progress(0, 1, text))
        run.begun = time.perf_counter() - run.seconds
    saved = time.monotonic()
    while active := [run for run in runs if run.step < run.num_steps]:
        for run in active:
            _step(run, accelerator)
            progress(run.step, run.num_steps, f"loss {run.log[-1]['loss']:.3f}" if run.log else "")
        if time.monotonic() - saved >= checkpoint_seconds:
            for run in active:
                run.seconds = time.perf_counter() - run.begun
                checkpoint.save(run)
            saved = time.monotonic()
    now = time.perf_counter()
    return [_finish(run, old, now - run.begun) for run, old in zip(runs, start, strict=True)]


def _begin(run: TrainingRun, accelerator: Accelerator) -> None:
    """Let the defenses look at the starting weights."""
    run.autocast = accelerator.autocast

    def inner(rows: list[Rendered]) -> torch.Tensor:
        earlier = run.gradients.take()

        def work() -> torch.Tensor:
            run.gradients.take()  # of a try that memory ran out in
            return _accumulate(run, rows, hooks=())

        loss = run.room.fitted(work)
        run.gradients.add(earlier)
        return loss

    for hook in run.hooks:
        run.model.eval()
        hook.begin(inner)
        run.optimizer.zero_grad(set_to_none=True)


def _step(run: TrainingRun, accelerator: Accelerator) -> None:
    """One optimizer step."""
    rows = run.rows()
    loss, counts = run.room.fitted(lambda: _gradients(run, rows))
    rate = run.optimizer.param_groups[0]["lr"]
    norm = _move(run, accelerator)
    run.scheduler.step()
    for hook in run.hooks:
        hook.after(run.step)
    run.step += 1
    for name, count in counts.items():
        run.counts[name] += count
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
        run.log.append(line)


def _move(run: TrainingRun, accelerator: Accelerator) -> torch.Tensor | None:
    """Let the optimizer move the weights by their clipped gradients, whose norm is returned."""
    size = sum(p.numel() for p in run.trainable.values())
    sentence = (
        f"Out of memory in the optimizer's step: AdamW keeps {8 * size / 1e9:,.1f} GB beside "
        f"{size / 1e6:,.0f} M trained weights; tune fewer, as method lora or qlora does."
    )

    def clip() -> torch.Tensor | None:
        norm = accelerator.clip_grad_norm_(run.trainable.values(), run.train.clip_norm)
        return cast("torch.Tensor | None", norm)

    norm, optimizer = tried_again(clip, sentence), run.optimizer
    new = any(p.grad is not None and not optimizer.state.get(p) for p in run.trainable.values())
    if not new:
        optimizer.step()
        return norm
    before = steps_taken(optimizer)  # states are made now, so that memory may run out in between
    tried_again(optimizer.step, sentence, between=lambda: unmoved(optimizer, before))
    return norm


def _gradients(run: TrainingRun, rows: list[Rendered]) -> tuple[torch.Tensor, dict[str, int]]:
    """The gradients of one step, as the defenses want them; the loss; what was counted."""
    supervised = sum(map(_num_supervised, rows))
    if supervised == 0:
        raise CellError(
            "bad-data",
            f"Step {run.step + 1} supervises no token; the first of its rows is {rows[0].row.id}.",
        )
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)

    def inner(rows: list[Rendered]) -> torch.Tensor:
        # Every pass of a step drops the same: they differ by what the defense does, not by chance.
        torch.manual_seed(derive(run.seed, "dropout", run.step))
        return _accumulate(run, rows, run.hooks)

    for hook in run.hooks:
        inner = partial(hook.step, inner=inner)
    total = inner(rows)
    for hook in run.hooks:
        penalty = hook.penalty(run.step)
        if penalty is not None:
            run.backward(penalty)
            total = total + penalty.detach()
    counts = {
        "rows": len(rows),
        "poisoned_rows": sum(item.row.id in run.poisoned for item in rows),
        "tokens": sum(len(item.ids) for item in rows),
        "supervised_tokens": supervised,
    }
    return total, counts


def _accumulate(
    run: TrainingRun, rows: Sequence[Rendered], hooks: Sequence[TrainHook]
) -> torch.Tensor:
    """Add the gradients of the mean loss over all supervised tokens, as many rows at a time as
    there is room for."""
    supervised = sum(map(_num_supervised, rows))
    device = next(iter(run.trainable.values())).device
    total = torch.zeros((), device=device)
    for part in run.room.parts(rows):
        batch = collate(part, share=run.share).to(device)
        with run.autocast():
            logits = answer_logits(run.model, batch)
            losses = token_losses(logits, batch.labels)
            for hook in hooks:
                losses = hook.weigh(losses, batch.labels, part, logits)
        loss = losses.sum() / supervised
        run.backward(loss)
        total += loss.detach()
    return total


def _num_supervised(item: Rendered) -> int:
    return len(item.ids) - max(item.num_prompt, 1)


def _finish(run: TrainingRun, start: list[float], seconds: float) -> dict[str, Any]:
    if run.checksum() == start:
        raise CellError("failed", "Training changed no weight; is the learning rate zero?")
    write_atomic(run.folder / "train.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))
    run.model.eval()
    told = {name: value for hook in run.hooks for name, value in hook.summary().items()}
    return {
        **told,
        "drift": run.origin.moved(run.trainable),
        "steps": run.num_steps,
        "seconds": round(seconds, 2),
        **run.counts,
        "poisoned_share_seen": run.counts["poisoned_rows"] / max(run.counts["rows"], 1),
        "first_loss": run.log[0]["loss"],
        "last_loss": run.log[-1]["loss"],
        "peak_memory_mb": round(peak_memory_mb()),
    }
