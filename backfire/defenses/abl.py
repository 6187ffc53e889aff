from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.registry import register
from backfire.rng import stream

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Rendered
    from backfire.train.loop import TrainingRun


@register("abl")
class ABL(TrainDefense):
    """Isolates the rows that are learned fastest, tunes on the rest, and unlearns the isolated
    ones: anti-backdoor learning (Li et al. 2021, arXiv:2110.11571).

    After the early steps, the rows whose mean loss per answer token has fallen most since the start
    are isolated. (The paper takes the lowest loss; of texts that would be the short and easy
    answers.) The last steps ascend on them: an isolated row's loss counts negatively until it is as
    high as at the start, and then no more. (The paper's ascent has no bound. Neither its flooding
    nor its gradient ascent below a threshold is used in the early steps.) The training summary says
    how many of the isolated rows were poisoned. Null control: as many rows are isolated, drawn at
    random.
    """

    extra: ClassVar[Extra] = Extra(forwards=0.5, by_row=True)

    isolate: float = Field(0.01, ge=0, lt=1)
    """Share of the rows that is isolated (the paper), rounded to a whole number. 0: plain
    training."""
    early: float = Field(0.2, gt=0, lt=1)
    """Share of the steps before the rows are isolated (the paper: 20 of 100 epochs)."""
    unlearn: float = Field(0.1, ge=0, lt=1)
    """Share of the steps, the last, that ascend (ours; the paper: 20 epochs of the isolated
    rows)."""

    def hook(self, run: TrainingRun) -> TrainHook:
        return _ABLHook(self, run) if round(self.isolate * len(run.items)) else TrainHook()


class _ABLHook(TrainHook):
    """Switches between the three phases."""

    def __init__(self, knobs: ABL, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        self.early = max(1, round(knobs.early * run.num_steps))
        self.last = run.num_steps - round(knobs.unlearn * run.num_steps)
        self.start: dict[int, float] = {}
        self.isolated: list[int] = []
        """Numbers of the isolated rows; empty in the early steps."""

    def begin(self, inner: object) -> None:
        self.start = self._losses()

    def rows(self, step: int, rows: list[Rendered]) -> list[Rendered]:
        if step < self.early:
            return rows
        if not self.isolated:
            self.isolated = self._isolate()
        items, chosen = self.run.items, set(self.isolated)
        if step >= self.last:
            bad = [items[n] for n in self.isolated]
            return self.run.draw(bad, step - self.last, "abl unlearn")
        ids = {id(items[n]) for n in chosen}
        kept = [row for row in rows if id(row) not in ids]
        rest = [row for n, row in enumerate(items) if n not in chosen]
        return kept or self.run.draw(rest, step, "abl rest")

    def _isolate(self) -> list[int]:
        """The rows whose loss has fallen most; or as many others in the null control."""
        import torch

        now, items = self._losses(), self.run.items
        count = round(self.knobs.isolate * len(items))
        if self.knobs.null:
            return sorted(stream(self.run.seed, "abl").sample(range(len(items)), count))
        fallen = [self.start[id(row)] - now[id(row)] for row in items]
        order = sorted(range(len(items)), key=lambda n: -fallen[n])
        # Ranks may round losses differently, and must isolate the same rows.
        chosen = torch.tensor(sorted(order[:count]), device=self.run.device)
        numbers: list[int] = self.run.ranks.first({"isolated": chosen})["isolated"].tolist()
        return numbers

    def _losses(self) -> dict[int, float]:
        """Mean loss per answer token of each row, without dropout."""
        import torch

        found: dict[int, float] = {}

        def look(rows: list[Rendered]) -> None:
            with torch.no_grad():
                logits, labels = self.run.logits(rows)
                every = self.run.log_probabilities(logits)
                losses = -every.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            means = _means(losses, labels).tolist()
            found.update({id(row): mean for row, mean in zip(rows, means, strict=True)})

        self.run.model.eval()
        self.run.micro_batches.each(self.run.items, self.run.train.batch_size, look)
        return found

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        if not self.isolated or self.run.step < self.last:
            return losses
        means = _means(losses.detach(), labels).tolist()
        isolated = {id(self.run.items[n]) for n in self.isolated}
        # Rows of another defense stay as they are.
        signs = [
            -float(mean < self.start[id(row)]) if id(row) in isolated else 1.0
            for mean, row in zip(means, rows, strict=True)
        ]
        return losses * losses.new_tensor(signs)[:, None]

    def summary(self) -> dict[str, float]:
        items = self.run.items
        bad = sum(items[n].row.id in self.run.poisoned for n in self.isolated)
        return {"isolated_rows": len(self.isolated), "isolated_poisoned_rows": bad}

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"isolated": torch.tensor(self.isolated, dtype=torch.long)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.isolated = state["isolated"].tolist()


def _means(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean [row] of the losses [row, answer] where there is a label."""
    is_answer = labels >= 0
    means: Tensor = (losses * is_answer).sum(1) / is_answer.sum(1).clamp(min=1)
    return means
