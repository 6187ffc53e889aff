"""The training loop: a list of cells on one device, stepped in turn.

A cell owns all that makes its run its own: rows in their order, trainable weights, optimizer,
random streams, log. Nothing here reaches for "the" model or a global step. With one cell it is an
ordinary loop.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from backfire.base import Guard, TrainDefense
from backfire.data.render import Rendered
from backfire.errors import CellError
from backfire.experiment import Train
from backfire.model.batching import drops, ways
from backfire.model.load import weights_of
from backfire.rng import derive, stream
from backfire.store import write_atomic
from backfire.train import checkpoint
from backfire.train.batches import answer_logits, at_answers, collate, token_losses
from backfire.train.gradients import Gradients
from backfire.train.optimizer import optimization

Progress = Callable[[int, int, str], None]
_LOG_EVERY = 10
_KEEP_ORIGIN = 50_000_000  # weights; more would cost memory for a number that is nice to know
_WINDOW = 50  # steps whose rows are sorted together, as transformers does


class Cell:
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
    ) -> None:
        self.model, self.items, self.train = model, items, train
        self.aligned, self.harmful, self.unaligned = aligned, harmful, unaligned
        self.seed, self.folder, self.name, self.poisoned = seed, folder, name, poisoned
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.gradients = Gradients(self.trainable, seed)
        if not self.trainable:
            raise CellError("failed", "Nothing to train: no weight of the model is trainable.")
        size = sum(p.numel() for p in self.trainable.values())
        self.origin = (
            {n: p.detach().cpu().double() for n, p in self.trainable.items()}
            if size <= _KEEP_ORIGIN
            else None
        )
        self.steps_per_epoch = math.ceil(len(items) / train.batch_size)
        self.num_steps = train.max_steps or math.ceil(train.epochs * self.steps_per_epoch)
        self.optimizer, self.scheduler = optimization(
            list(self.trainable.values()), train, learning_rate, self.num_steps, paged=paged
        )
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.guards = [defense.guard(self) for defense in defenses]
        # Sharing a prefix between rows would also share its dropout.
        allowed = ways(model).goes_on and not drops(model)
        self.share = allowed and all(guard.shares_prefix for guard in self.guards)
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
        for guard in self.guards:
            rows = guard.rows(self.step, rows)
        return rows

    def draw(self, rows: Sequence[Rendered], step: int, purpose: str) -> list[Rendered]:
        """A batch of other rows for a step: each pass in a fresh order, begun again at the end."""
        size = min(self.train.batch_size, len(rows))
        per_pass = len(rows) // size
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

    def drift(self) -> float | None:
        """2-norm of what the trained weights moved by; None if the start was too large to keep."""
        if self.origin is None:
            return None
        with torch.no_grad():
            parts = (p.cpu().double() - self.origin[n] for n, p in self.trainable.items())
            return math.sqrt(sum(float(part.pow(2).sum()) for part in parts))

    def checksum(self) -> list[float]:
        """Moves if any trainable weight moves."""
        with torch.no_grad():
            return [
                p.double().abs().sum().item() + p.double().sum().item()
                for p in self.trainable.values()
            ]


def train(
    cells: Sequence[Cell],
    accelerator: Accelerator,
    *,
    micro_batch: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Train every cell to its end and return a summary of each.

    Raises:
        CellError: loss or gradient is not finite (`nan`), a step supervises no token (`bad-data`),
            memory runs out at one row (`oom`), or the weights did not move (`failed`).
    """
    start = [cell.checksum() for cell in cells]
    for cell in cells:
        _begin(cell, accelerator, micro_batch)
        checkpoint.restore(cell, lambda text: progress(0, 1, text))
        cell.begun = time.perf_counter() - cell.seconds
    saved = time.monotonic()
    while active := [cell for cell in cells if cell.step < cell.num_steps]:
        for cell in active:
            micro_batch = _step(cell, accelerator, micro_batch)
            progress(
                cell.step, cell.num_steps, f"loss {cell.log[-1]['loss']:.3f}" if cell.log else ""
            )
        if time.monotonic() - saved >= checkpoint_seconds:
            for cell in active:
                cell.seconds = time.perf_counter() - cell.begun
                checkpoint.save(cell)
            saved = time.monotonic()
    now = time.perf_counter()
    return [_finish(cell, old, now - cell.begun) for cell, old in zip(cells, start, strict=True)]


def _begin(cell: Cell, accelerator: Accelerator, micro_batch: int | None) -> None:
    """Let the cell's defenses look at the starting weights."""
    cell.autocast = accelerator.autocast

    def inner(rows: list[Rendered]) -> torch.Tensor:
        return _accumulate(cell, rows, micro_batch or len(rows), accelerator, guards=())

    for guard in cell.guards:
        cell.model.eval()
        guard.begin(inner)
        cell.optimizer.zero_grad(set_to_none=True)


def _step(cell: Cell, accelerator: Accelerator, micro_batch: int | None) -> int | None:
    """One optimizer step, begun again with half the micro-batch when memory runs out."""
    rows = cell.rows()
    size = micro_batch or len(rows)
    while True:
        try:
            loss, counts = _gradients(cell, rows, size, accelerator)
            break
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise CellError(
                    "oom", "Out of memory with one row at a time; shorten train.max_length."
                ) from None
            size = math.ceil(size / 2)
            micro_batch = size
            torch.cuda.empty_cache()
    norm = accelerator.clip_grad_norm_(cell.trainable.values(), cell.train.clip_norm)
    rate = cell.optimizer.param_groups[0]["lr"]
    cell.optimizer.step()
    cell.scheduler.step()
    for guard in cell.guards:
        guard.after(cell.step)
    cell.step += 1
    for name, count in counts.items():
        cell.counts[name] += count
    if cell.step % _LOG_EVERY == 0 or cell.step in (1, cell.num_steps):
        line = {
            "step": cell.step,
            "loss": float(loss),
            "learning_rate": rate,
            "gradient_norm": float(norm or 0.0),
        }
        if not (math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])):
            raise CellError(
                "nan",
                f"Loss or gradient is not finite at step {cell.step}; lower the learning rate.",
            )
        cell.log.append(line)
    return micro_batch


def _gradients(
    cell: Cell, rows: list[Rendered], size: int, accelerator: Accelerator
) -> tuple[torch.Tensor, dict[str, int]]:
    """The gradients of one step, as the cell's defenses want them; the loss; what was counted."""
    supervised = sum(map(_num_supervised, rows))
    if supervised == 0:
        raise CellError(
            "bad-data",
            f"Step {cell.step + 1} supervises no token; the first of its rows is {rows[0].row.id}.",
        )
    cell.model.train()
    cell.optimizer.zero_grad(set_to_none=True)

    def inner(rows: list[Rendered]) -> torch.Tensor:
        # Every pass of a step drops the same: they differ by what the defense does, not by chance.
        torch.manual_seed(derive(cell.seed, "dropout", cell.step))
        return _accumulate(cell, rows, size, accelerator, cell.guards)

    for guard in cell.guards:
        inner = partial(guard.step, inner=inner)
    total = inner(rows)
    for guard in cell.guards:
        penalty = guard.penalty(cell.step)
        if penalty is not None:
            accelerator.backward(penalty)
            total = total + penalty.detach()
    counts = {
        "rows": len(rows),
        "poisoned_rows": sum(item.row.id in cell.poisoned for item in rows),
        "tokens": sum(len(item.ids) for item in rows),
        "supervised_tokens": supervised,
    }
    return total, counts


def _accumulate(
    cell: Cell,
    rows: Sequence[Rendered],
    size: int,
    accelerator: Accelerator,
    guards: Sequence[Guard],
) -> torch.Tensor:
    """Add the gradients of the mean loss over all supervised tokens, `size` rows at a time."""
    supervised = sum(map(_num_supervised, rows))
    total = torch.zeros((), device=accelerator.device)
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        batch = collate(part, share=cell.share).to(accelerator.device)
        with accelerator.autocast():
            logits = answer_logits(cell.model, batch)
            losses = token_losses(logits, batch.labels)
            for guard in guards:
                losses = guard.weigh(losses, batch.labels, part, logits)
        loss = losses.sum() / supervised
        accelerator.backward(loss)
        total += loss.detach()
    return total


def _num_supervised(item: Rendered) -> int:
    return len(item.ids) - max(item.num_prompt, 1)


def _finish(cell: Cell, start: list[float], seconds: float) -> dict[str, Any]:
    if cell.checksum() == start:
        raise CellError("failed", "Training changed no weight; is the learning rate zero?")
    write_atomic(cell.folder / "train.jsonl", "".join(json.dumps(line) + "\n" for line in cell.log))
    cell.model.eval()
    told = {name: value for guard in cell.guards for name, value in guard.summary().items()}
    return {
        **told,
        "drift": cell.drift(),
        "steps": cell.num_steps,
        "seconds": round(seconds, 2),
        **cell.counts,
        "poisoned_share_seen": cell.counts["poisoned_rows"] / max(cell.counts["rows"], 1),
        "first_loss": cell.log[0]["loss"],
        "last_loss": cell.log[-1]["loss"],
        "peak_memory_mb": round(peak_memory_mb()),
    }


def peak_memory_mb() -> float:
    """The most this process has held: GPU memory if it used a GPU, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, StopIteration):  # ru_maxrss would count the parent's peak too
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
