from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import Extra, Preset, TrainDefense, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Rendered
    from backfire.train.loop import TrainingRun


@register("lisa", version=2)
class Lisa(TrainDefense):
    """Alternates between alignment and fine-tuning, each held near the weights where the other
    stopped (Huang et al. 2024, NeurIPS, arXiv:2405.18641, algorithm 2).

    In the alignment state the loss is that of alignment rows, plus rho / 2 times the squared
    distance to the last weights of the fine-tuning state; in the fine-tuning state the reverse.
    Anchors change only when the state does. (The authors' README swaps the two anchors; their code
    and paper agree with this implementation.) The proximal term is off for the first tenth of all
    steps, as in their code, and alignment batches continue where the last alignment state stopped.
    Null control: the anchors follow the weights at every step, so the proximal term is zero.
    """

    extra: ClassVar[Extra] = Extra(copies=2, scratch=2)
    needs_alignment: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "lisa-paper": Preset(
            "the paper's settings", {"rho": 1.0, "align_steps": 100, "tune_steps": 900}
        ),
        "lisa-script": Preset(
            "git-disl/Lisa, shipped script", {"rho": 1.0, "align_steps": 100, "tune_steps": 900}
        ),
        "lisa-argparse": Preset(
            "git-disl/Lisa, defaults of its arguments",
            {"rho": 0.1, "align_steps": 500, "tune_steps": 500},
        ),
        "booster-port": Preset(
            "Booster's Lisa baseline", {"rho": 0.01, "align_steps": 100, "tune_steps": 900}
        ),
    }

    rho: float = Field(1.0, ge=0)
    """Strength of the proximal term. Theory requires more than the gradient's Lipschitz constant,
    so it depends on the model and its learning rate: 1 for 7B; 0.01 (LoRA) to 1 worked best with
    the sandbox's base. 0 is the paper's BSO."""
    align_steps: int = Field(100, ge=0)
    """Steps of each alignment state; 0: no alignment state."""
    tune_steps: int = Field(900, ge=1)
    """Steps of each fine-tuning state."""
    free_share: float = Field(0.1, ge=0, le=1)
    """Share of all steps, at the start, without the proximal term (the authors' code; not in the
    paper)."""

    def hook(self, run: TrainingRun) -> TrainHook:
        self.suits(aligned=bool(run.aligned), harm=True)
        return _LisaHook(self, run)


class _LisaHook(TrainHook):
    """Switches between the two states and keeps the anchor of each."""

    def __init__(self, knobs: Lisa, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        # Both begin at the starting weights.
        self.anchors = {state: run.weights() for state in ("align", "tune")}

    def is_aligning(self, step: int) -> bool:
        """Whether the step belongs to an alignment state; the first state is one."""
        span = self.knobs.align_steps + self.knobs.tune_steps
        return step % span < self.knobs.align_steps

    def rows(self, step: int, rows: list[Rendered]) -> list[Rendered]:
        # The user's rows of these steps are skipped, as in the authors' code.
        if self.is_aligning(step):
            turn, place = divmod(step, self.knobs.align_steps + self.knobs.tune_steps)
            number = turn * self.knobs.align_steps + place
            return self.run.draw(self.run.aligned, number, "lisa")
        return rows

    def penalty(self, step: int) -> Tensor | None:
        import torch

        if not self.knobs.rho or step <= self.knobs.free_share * self.run.num_steps:
            return None
        # The alignment state is held near the weights where fine-tuning stopped, and the reverse.
        anchor = self.anchors["tune" if self.is_aligning(step) else "align"]
        parts = [(p - anchor[n]).pow(2).sum() for n, p in self.run.trainable.items()]
        total: Tensor = torch.stack(parts).sum()
        return total * self.knobs.rho / 2

    def after(self, step: int) -> None:
        if self.knobs.null:
            self.anchors = {state: self.run.weights() for state in self.anchors}
        elif self.is_aligning(step) != self.is_aligning(step + 1):
            self.anchors["align" if self.is_aligning(step) else "tune"] = self.run.weights()

    def state(self) -> dict[str, Tensor]:
        parts = self.anchors.items()
        return {f"{state} {n}": w for state, anchor in parts for n, w in anchor.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for key, weight in state.items():
            turn, _, name = key.partition(" ")
            self.anchors[turn][name] = weight.to(self.anchors[turn][name].device)
