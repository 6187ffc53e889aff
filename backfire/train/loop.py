"""The training loop: several training runs on one device, one step each in turn, or in one pass
where they share their base (`train.together`).

A `TrainingRun` owns all of its state: row order, trainable weights, optimizer, random streams, log.
The loop has no global model or step. With one run it is an ordinary training loop.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from backfire.base import Rendered, TrainDefense
from backfire.errors import CellError, Stopped
from backfire.experiment import Train
from backfire.model.load import weights_of
from backfire.model.memory import Heap
from backfire.progress import Pace, Progress, silent
from backfire.train import checkpoint, steps
from backfire.train.batches import (
    Layout,
    answer_logits,
    at_answers,
    log_probabilities,
)
from backfire.train.drift import Origin
from backfire.train.gradients import Gradients
from backfire.train.half import LossScale, MasterWeights
from backfire.train.microbatch import (
    MicroBatches,
    recompute_layers,
    refuse_hooks,
    tokens_that_fit,
)
from backfire.train.optimizer import first_step_bytes, make_optimizer
from backfire.train.order import drawn, steps_of
from backfire.train.precision import Precision
from backfire.train.ranks import Ranks
from backfire.train.sharding import local
from backfire.train.steps import Outcome
from backfire.train.together import Together


class TrainingRun:
    """The training of one model."""

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
        trained_type: str = "float32",
        defenses: Sequence[TrainDefense] = (),
        aligned: Sequence[Rendered] = (),
        harmful: Sequence[Rendered] = (),
        unaligned: Path | None = None,
        start: Path | None = None,
        recompute: bool = False,
        packing: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.items, self.train = model, items, train
        self.ranks = ranks or Ranks()
        self.aligned, self.harmful, self.unaligned = aligned, harmful, unaligned
        self.seed, self.folder, self.name, self.poisoned = seed, folder, name, poisoned
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise CellError("failed", "Nothing to train: no weight of the model is trainable.")
        self.device = next(iter(self.trainable.values())).device
        self.gradients = Gradients(self.trainable, seed, self.ranks)
        self.origin = Origin(self.trainable, start)
        self.steps_per_epoch = math.ceil(len(items) / train.batch_size)
        self.num_steps = train.max_steps or math.ceil(train.epochs * self.steps_per_epoch)
        self.optimizer, self.scheduler = make_optimizer(
            model, self.trainable, train, learning_rate, self.num_steps, paged=paged
        )
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.hooks = [defense.hook(self) for defense in defenses]
        self.master = MasterWeights(model, trained_type)  # after hooks, which copy the weights
        self.scaling = LossScale()  # until its type is known
        once = recompute or self.ranks.sharded
        self.layout = Layout.of(model, self.hooks, once=once, packing=packing)
        if recompute:
            recompute_layers(model)
        reserved = first_step_bytes(self.trainable, train.optimizer)
        tokens, self.layout.answer_size = tokens_that_fit(model, reserved)
        self.micro_batches = MicroBatches(tokens=tokens, size=self.layout.size, ranks=self.ranks)
        self.recompute, self.recomputing = recompute, False
        self.heap = Heap(self.device)
        self._epoch, self._steps = -1, list[list[Rendered]]()
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        self.counts = {"rows": 0, "poisoned_rows": 0, "tokens": 0, "supervised_tokens": 0}

    def go_to(self, step: int, log: list[dict[str, float]], counts: dict[str, int]) -> None:
        """Continue after `step` steps; the optimizer's state is already loaded."""
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
        """The rows of the current step; every epoch has a new order from its own random stream."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._steps = epoch, steps_of(self.items, self.train, self.seed, epoch)
        rows = self._steps[place]
        for hook in self.hooks:
            rows = hook.rows(self.step, rows)
        return rows

    def draw(self, rows: Sequence[Rendered], step: int, purpose: str) -> list[Rendered]:
        """A batch of these extra rows for a step; every pass over them has a new order."""
        return drawn(rows, self.train.batch_size, self.seed, step, purpose)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the current trainable weights."""
        return {name: p.detach().clone() for name, p in self.trainable.items()}

    @contextlib.contextmanager
    def at(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Swap in these trainable weights, without dropout and gradients; frozen ones are not
        copied."""
        # FSDP2 gathers a sharded weight from its memory, so that is overwritten for a while.
        sharded = self.ranks.sharded
        own = {n: p.data.clone() if sharded else p.data for n, p in self.trainable.items()}
        training = self.model.training
        cached = torch.is_autocast_cache_enabled()
        # Otherwise autocast reuses its bfloat16 copies of the replaced weights.
        torch.set_autocast_cache_enabled(False)
        try:
            self._put({name: weights[name].to(kept.dtype) for name, kept in own.items()})
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            self._put(own)
            self.model.train(training)
            torch.set_autocast_cache_enabled(cached)

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trainable.items():
            if self.ranks.sharded:
                parameter.data.copy_(weights[name])
            else:
                parameter.data = weights[name]

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """Make bfloat16 weights their float32 masters within the context, as hooks see them outside
        of the passes."""
        return self.master.exact()

    def logits(
        self, rows: Sequence[Rendered], *, flat: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [row, answer, vocab] of the answer tokens, and these tokens [row, answer]; `flat`:
        of packed rows [1, answer], without padding."""
        batch = self.layout.collate(rows, flat=flat).to(self.device)
        with self.autocast():
            return answer_logits(self.model, batch), batch.labels

    once = checkpoint.once
    at_answers = staticmethod(at_answers)
    log_probabilities = staticmethod(log_probabilities)

    def unaligned_weights(self) -> dict[str, torch.Tensor]:
        """Weights before the alignment stage, by name in the plain model; empty without one."""
        return weights_of(self.unaligned) if self.unaligned else {}

    def backward(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Accumulate the gradients of a loss, or of tensors with given gradients. `recomputing` is
        true during the call: module hooks then see recomputed layers."""
        if self.recompute:
            refuse_hooks(self.model, self.hooks)
        if gradients is None:
            tensors = self.scaling.scaled(cast(torch.Tensor, tensors))
        self.recomputing = True
        try:
            torch.autograd.backward(tensors, gradients)
        finally:
            self.recomputing = False

    def close(self) -> None:
        """Release the model, and break the reference cycles (run and hooks, optimizer and
        schedule), so that its memory is freed at once."""
        self.optimizer.param_groups.clear()
        self.optimizer.state.clear()
        self.hooks, self.trainable, self.autocast = [], {}, contextlib.nullcontext
        self.gradients.weights = {}
        self.scaling.close()
        del self.model, self.optimizer, self.scheduler, self.origin, self.master

    def checksum(self) -> list[float]:
        """Changes if any trainable weight changes."""
        with torch.no_grad(), self.exact():
            # Neither makes a float64 copy of the weights.
            return [
                p.sum(dtype=torch.float64).item()
                + torch.linalg.vector_norm(p, 1, dtype=torch.float64).item()
                for p in map(local, self.trainable.values())
            ]


def train(
    runs: Sequence[TrainingRun],
    precision: Precision,
    *,
    micro_batch: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train every run to the end and return their summaries.

    Raises:
        CellError: loss or gradient is not finite (`nan`), a step supervises no token (`bad-data`),
            memory runs out at one row (`oom`), or the weights did not change (`failed`).
        Stopped: by `progress`, after a checkpoint.
    """
    limits = {"micro_batch": micro_batch, "checkpoint_seconds": checkpoint_seconds}
    ends = train_each(runs, precision, [progress] * len(runs), **cast(Any, limits))
    return [summary_of(ends.pop(0)) for _ in runs]


def summary_of(end: Outcome) -> dict[str, Any]:
    """The summary of a run; raises the error that ended it."""
    try:
        if isinstance(end, BaseException):
            raise end
        return end
    finally:
        del end  # an error holds this frame, and a circle would keep the model in memory


def train_each(
    runs: Sequence[TrainingRun],
    precision: Precision,
    progress: Sequence[Progress],
    *,
    together: Together | None = None,
    micro_batch: int | None = None,
    checkpoint_seconds: float = 60.0,
) -> list[Outcome]:
    """Train every run to the end; the errors of one leave the others alone. `together` makes the
    passes of those that it joins; the others take their steps in turn.

    Raises:
        Stopped: by a `progress`, after a checkpoint of every run.
    """
    ends: dict[TrainingRun, Outcome] = {}
    start: dict[TrainingRun, list[float]] = {}
    for run, report in zip(runs, progress, strict=True):
        with steps.noted(ends, run):
            start[run] = _start(run, precision, micro_batch, report)
    reports = {
        run: (report, Pace(run.counts["rows"])) for run, report in zip(runs, progress, strict=True)
    }
    texts = dict.fromkeys(runs, "training")
    saved, wait, mark = time.monotonic(), checkpoint_seconds, time.perf_counter()
    while active := [run for run in runs if run not in ends and run.step < run.num_steps]:
        stopped: Stopped | None = None
        for run, loss in _turn(active, together, ends).items():
            texts[run] = reports[run][1].text("training", run.counts["rows"], loss)
        for run in [run for run in runs if run not in ends]:  # one that waits may lose its claim
            try:
                with steps.noted(ends, run):
                    reports[run][0](run.step, run.num_steps, texts[run])
            except Stopped as error:
                stopped = error
        now = time.perf_counter()
        for run in active:
            run.seconds += (now - mark) / len(active)
        mark, begun = now, time.monotonic()
        due = stopped is not None or begun - saved >= wait
        left = [run for run in active if run not in ends]  # other ranks do not wait for the others
        ended = [run for run in left if run.step == run.num_steps]
        every = any(run.ranks.decide(due) for run in left)
        waiting = ended if len(ended) < len(left) else []  # for the others; their steps are kept
        for run in left if every else waiting:
            with steps.noted(ends, run):
                checkpoint.save(run)
        if every:
            saved = time.monotonic()
            wait = checkpoint.interval(checkpoint_seconds, saved - begun)
        if stopped and any(run not in ends for run in runs):
            raise stopped
    for run in runs:
        if run not in ends:
            with steps.noted(ends, run):
                ends[run] = steps.finish(run, start[run])
    return [ends.pop(run) for run in runs]  # an error holds the frames that hold `ends`


def _start(
    run: TrainingRun, precision: Precision, micro_batch: int | None, report: Progress
) -> list[float]:
    """Make a run ready for its first step, or that after its checkpoint; returns the checksum of
    the weights that it starts from."""
    checksum = run.checksum()
    run.ranks.agree_on_weights(checksum)
    run.micro_batches.rows = micro_batch
    steps.begin(run, precision)
    checkpoint.restore(run, lambda text: report(0, 1, text))
    return checksum


def _turn(
    active: Sequence[TrainingRun], together: Together | None, ends: dict[TrainingRun, Outcome]
) -> dict[TrainingRun, torch.Tensor]:
    """One step of each of these runs; returns their losses. Runs that fail are noted instead."""
    losses = together.step(active, ends) if together else {}
    for run in active:
        if run not in losses and run not in ends:
            with steps.noted(ends, run):
                losses[run] = steps.step(run)
    return losses
