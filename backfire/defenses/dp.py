from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive, stream

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("dp")
class DP(TrainDefense):
    """Clips each row's gradient and adds noise, which bounds the influence of any single row
    (DP-SGD, Abadi et al. 2016, arXiv:1607.00133; steps by AdamW).

    Each step includes every row with the same probability (Poisson sampling), as the accountant
    assumes, so steps differ in size; the common shuffled batches violate that assumption. A row's
    loss is the mean over its tokens. The reported epsilon is Opacus' for one row of the training
    set: a secret in k rows is protected k times worse or more. It holds as long as nobody knows the
    seed. Use it as the only defense that selects rows. Requires Opacus (`pip install
    "backfire[dp]"`). Null control: the same rows and passes, without clipping and noise.
    """

    extra: ClassVar[Extra] = Extra(copies=1, one_row=True)
    joins: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    epsilon: float | None = Field(8.0, gt=0)
    """Privacy budget of the whole fine-tuning run, which determines the noise (8 is a usual mild
    one, 1 a strict one); null: `noise_multiplier` sets the noise."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Probability that the guarantee fails. Default: 1 / (number of training rows)."""
    noise_multiplier: float = Field(1.0, ge=0)
    """Standard deviation of the noise divided by the clipping norm, if `epsilon` is null; 0:
    clipping alone, which guarantees nothing."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """2-norm to which each row's gradient is clipped (Opacus' examples: 1)."""
    accountant: Literal["prv", "rdp"] = "prv"
    """How the budget is computed: numerically (Gopi et al. 2021) or by the looser Renyi bound."""

    def hook(self, run: TrainingRun) -> TrainHook:
        return _DPHook(self, run)


class _DPHook(TrainHook):
    """Clips the gradient of each row, sums them and adds noise."""

    shares_prefix: ClassVar[bool] = False

    def __init__(self, knobs: DP, run: TrainingRun) -> None:
        self.knobs, self.run, self.drew_none = knobs, run, False
        self.rate = min(1.0, run.train.batch_size / len(run.items))
        self.delta = knobs.delta or 1 / len(run.items)
        self.noise = 0.0 if knobs.null else knobs.noise_multiplier
        if knobs.epsilon is not None and not knobs.null:
            self.noise = _opacus(knobs, self.rate, self.delta, run.num_steps)

    def rows(self, step: int, rows: list[Rendered]) -> list[Rendered]:
        rng = stream(self.run.seed, "dp", step)
        drawn = [row for row in self.run.items if rng.random() < self.rate]
        self.drew_none = not drawn
        return drawn or rows[:1]  # without any row the step is noise alone

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        import torch

        gradients, most, losses = self.run.gradients, self.knobs.max_gradient_norm, list[Any]()
        earlier, weights = gradients.take(), self.run.trainable
        total = {n: torch.zeros_like(w, dtype=gradients.wide(w)) for n, w in weights.items()}
        for row in rows:
            losses.append(inner([row]))
            own = gradients.take()
            norm = max(1e-12, float(gradients.norm(own.values())))
            scale = 1.0 if self.knobs.null else min(1.0, most / norm)
            for name, gradient in own.items() if not self.drew_none else ():
                total[name] += gradient * scale
        size = self.rate * len(self.run.items)  # expected size; the true one would leak information
        for name, part in total.items():
            if self.noise:
                generator = torch.Generator(part.device)
                generator.manual_seed(derive(self.run.seed, "dp", "noise", self.run.step, name))
                part.add_(torch.empty_like(part).normal_(generator=generator) * self.noise * most)
            part /= size
        gradients.add(earlier)
        gradients.add(total)
        return torch.stack(losses).mean()

    def summary(self) -> dict[str, float]:
        if not self.noise:
            return {}
        spent = _opacus(self.knobs, self.rate, self.delta, self.run.num_steps, self.noise)
        return {"privacy_epsilon": spent, "privacy_delta": self.delta, "dp_noise": self.noise}


def _opacus(knobs: DP, rate: float, delta: float, steps: int, noise: float | None = None) -> float:
    """Return the epsilon for this noise or, without `noise`, the noise for the knobs' epsilon."""
    try:
        from opacus.accountants import create_accountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError:
        raise UserError("defense 'dp' requires Opacus: pip install \"backfire[dp]\".") from None
    named: dict[str, Any] = {"target_epsilon": knobs.epsilon, "target_delta": delta}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the range of orders that were tried
            if noise is None:
                named |= {"sample_rate": rate, "steps": steps, "accountant": knobs.accountant}
                return float(get_noise_multiplier(**named))
            counted = create_accountant(knobs.accountant)
            counted.history = [(noise, rate, steps)]
            return float(counted.get_epsilon(delta))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"defense 'dp': Opacus cannot compute the budget: {error}") from None
