"""Several runs of one base in one pass: all their rows in one line, each with its own adapter.

A step of a few short rows leaves a processor or a GPU idle between its products; the rows of
several runs fill it. Every run has its own rows, hooks, loss and optimizer, as if it were alone.
What is not finite in one run stays in its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backfire.base import Rendered, TrainHook
from backfire.errors import is_out_of_memory
from backfire.experiment import JOINED_TOKENS
from backfire.model.fan import Fan, Share
from backfire.model.fused import trained_layers
from backfire.train import steps
from backfire.train.batches import Span, answer_logits, in_one_line, packed, shared_prefix
from backfire.train.microbatch import unless_out_of_memory
from backfire.train.passes import loss_of, num_supervised, reads_flat

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun
    from backfire.train.steps import Outcome


class Together:
    """Makes the passes of several runs, whose models share their base (`model.fan`)."""

    def __init__(
        self, runs: Sequence[TrainingRun], fan: Fan, *, tokens: float | None = None
    ) -> None:
        """`tokens`: most of them in a pass; by default as many as pay on this device."""
        self.runs, self.fan = list(runs), fan
        self.model = runs[0].model
        """The model through which the rows of all runs go."""
        self.joining = [run for run in runs if joins(run)]
        self.longest = min((run.layout.longest_packed for run in self.joining), default=0)
        device = runs[0].device.type
        # The kernel for rows of unequal length takes one prefix only.
        self.share = device == "cpu" and all(run.layout.share for run in self.joining)
        self.tokens = JOINED_TOKENS.get(device, 0) if tokens is None else tokens

    def step(
        self, active: Sequence[TrainingRun], ends: dict[TrainingRun, Outcome]
    ) -> dict[TrainingRun, Tensor]:
        """One step of those of the runs that can join, if there are two; returns their losses. Runs
        that fail are noted instead."""
        joining = [run for run in active if run in self.joining and not run.scaling.on]
        losses: dict[TrainingRun, Tensor] = {}
        if len(joining) < 2 or not self.tokens:
            return losses
        rows: dict[TrainingRun, list[Rendered]] = {}
        for run in joining:
            with steps.noted(ends, run):
                rows[run] = run.rows()
                steps.check(run, rows[run])
        fitting = {run: own for run, own in rows.items() if run not in ends and self._fit(own)}
        found = unless_out_of_memory(lambda: self._gradients(fitting, ends))
        if found is None:
            self.tokens = 0  # from now on each run alone, in passes as small as it takes
        for run, own in rows.items():
            if run not in ends:
                with steps.noted(ends, run):
                    if found is None or run not in fitting:
                        losses[run] = steps.step(run, own)
                    else:
                        losses[run] = steps.update(run, own, found[0][run])
        return losses

    def _fit(self, rows: Sequence[Rendered]) -> bool:
        return max(len(row.ids) for row in rows) <= self.longest

    def _gradients(
        self, rows: Mapping[TrainingRun, list[Rendered]], ends: dict[TrainingRun, Outcome]
    ) -> dict[TrainingRun, Tensor]:
        """Compute the gradients of one step of each run; returns the losses. Memory that runs out
        ends none of them."""
        losses = {run: torch.zeros((), device=run.device) for run in rows}
        for run in rows:
            run.micro_batches.forget()
            run.model.train()
            run.optimizer.zero_grad(set_to_none=True)
        for part in self._passes(rows):
            heap = part[0][0].heap
            parts: dict[TrainingRun, Tensor] = {}
            before = heap.used()
            for run, own, logits, labels in self._logits(part):
                with steps.noted(ends, run, but=is_out_of_memory):
                    loss = loss_of(run, own, run.hooks, logits, labels)
                    # A pass may have several pieces of a run.
                    parts[run] = parts.get(run, 0) + loss / num_supervised(rows[run])
            heap.tidy(before)
            torch.autograd.backward(list(parts.values()))
            for run, loss in parts.items():
                losses[run] += loss.detach()
        for run in rows:
            if run not in ends:
                with steps.noted(ends, run, but=is_out_of_memory):
                    losses[run] = steps.penalized(run, losses[run])
        return losses

    def _passes(
        self, rows: Mapping[TrainingRun, list[Rendered]]
    ) -> Iterator[list[tuple[TrainingRun, list[Rendered]]]]:
        """The rows of each pass, by run: what each run would have in a pass of its own, as much of
        it as pays and fits."""
        part: list[tuple[TrainingRun, list[Rendered]]] = []
        size = 0.0
        for run, own in rows.items():
            for few in run.micro_batches.split(own):
                more = run.layout.size(few)
                if part and size + more > min(self.tokens, run.micro_batches.tokens):
                    yield part
                    part, size = [], 0.0
                part.append((run, few))
                size += more
        if part:
            yield part

    def _logits(
        self, part: Sequence[tuple[TrainingRun, list[Rendered]]]
    ) -> list[tuple[TrainingRun, list[Rendered], Tensor, Tensor]]:
        """The rows of a pass with their logits [row, answer, vocab] and labels [row, answer]."""
        if len(part) == 1:
            run, rows = part[0]
            return [(run, rows, *run.logits(rows, flat=reads_flat(run.hooks)))]
        spans = [list(map(Span.of, rows)) for _, rows in part]
        shared = shared_prefix([span for own in spans for span in own]) if self.share else 0
        packs = [
            packed(own, shared, flat=reads_flat(run.hooks)).to(run.device)
            for own, (run, _) in zip(spans, part, strict=True)
        ]
        number = {run: n for n, run in enumerate(self.runs)}
        shares: list[Share] = [
            (number[run], pack.ids.shape[1], pack.labels.numel())
            for pack, (run, _) in zip(packs, part, strict=True)
        ]
        with self.fan.divided(shares), part[0][0].autocast():
            logits = answer_logits(self.model, in_one_line(packs))[0]
        pieces = torch.split(logits, [pack.labels.numel() for pack in packs])
        return [
            (run, rows, piece.view(*pack.labels.shape, -1), pack.labels)
            for (run, rows), pack, piece in zip(part, packs, pieces, strict=True)
        ]


def joins(run: TrainingRun) -> bool:
    """Whether a run may have its steps in one pass with others: not if weights are trained outside
    the LoRA layers that are divided among the runs, its layers are recomputed, its rows are padded,
    or a hook defines the step."""
    if run.ranks.several or run.recompute or not run.layout.longest_packed:
        return False
    divided = {id(p) for layer in trained_layers(run.model) for p in layer.parameters()}
    if any(id(p) not in divided for p in run.trainable.values()):
        return False
    return all(type(hook).step is TrainHook.step for hook in run.hooks)
