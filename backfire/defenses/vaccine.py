from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import AlignDefense, Extra, Preset, TrainHook
from backfire.errors import UserError
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("vaccine")
class Vaccine(AlignDefense):
    """Aligns under the worst small perturbation of the attention modules' outputs (Huang et al.
    2024, arXiv:2402.01109).

    Two passes per step. The first computes the gradient g of the loss with respect to each
    attention module's output; the second adds rho * g / (2-norm of all g together + 1e-7) to those
    outputs, and its gradient and loss are those of the step. Both passes use the same dropout masks
    (in the authors' code different ones). If memory splits a step, all its rows share one norm.
    Null control: a random perturbation of the same norm, on the tokens where g is not zero; the
    first pass is still run. (The authors' random control adds noise of variance rho to every
    coordinate.) Only this random perturbation depends on how memory or devices split a step.
    """

    extra: ClassVar[Extra] = Extra(states=3, passes=1)
    joins: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]] = {
        "vaccine-script": Preset("git-disl/Vaccine, README and paper", {"rho": 2.0}),
        "booster-port": Preset("git-disl/Booster, script/alignment/vaccine.sh", {"rho": 5.0}),
    }

    rho: float = Field(2.0, ge=0)
    """2-norm of the perturbation over all attention modules, rows and tokens of a step. The default
    is the paper's, for 7B; it depends on the size of the activations. 0: plain training."""

    def hook(self, run: TrainingRun) -> TrainHook:
        if not self.rho:
            return TrainHook()
        modules = _attention(run.model)
        if not modules:
            raise UserError("defense 'vaccine': the model has no attention module.")
        return _VaccineHook(self, run, modules)


class _VaccineHook(TrainHook):
    """Runs the two passes of a step and perturbs the attention modules' outputs."""

    shares_prefix: ClassVar[bool] = False  # each row has its own perturbation
    knows_recomputing: ClassVar[bool] = True

    def __init__(self, knobs: Vaccine, run: TrainingRun, modules: list[Any]) -> None:
        self.knobs, self.run, self.modules = knobs, run, modules
        self.packs = not knobs.null  # the random perturbation depends on the layout of the rows

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        import torch

        gradients = self.run.gradients
        earlier, added = gradients.take(), list[Any]()

        def nothing(out: Tensor) -> Tensor:
            # The zeros' gradient is the output's, even if no weight below it is trained.
            added.append(torch.zeros_like(out, requires_grad=True))
            zeros: Tensor = added[-1]
            return zeros

        with self.adding(nothing):
            inner(rows)
        gradients.take()
        perturbation = {
            f"{place}": zeros.detach() if zeros.grad is None else zeros.grad
            for place, zeros in enumerate(added)
        }
        norm = gradients.norm_over_ranks(perturbation.values())
        if self.knobs.null:
            purpose = ("vaccine", self.run.step, *self.run.ranks.own)
            perturbation = gradients.random_like(perturbation, *purpose)
        # In the order in which the modules run, which is the same in both passes.
        parts = iter([g * (self.knobs.rho / (norm + 1e-7)) for g in perturbation.values()])
        with self.adding(lambda out: next(parts).to(out.dtype)):
            loss = inner(rows)
        gradients.add(earlier)
        return loss

    @contextmanager
    def adding(self, part: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Add `part` of each attention module's output to that output within the context."""
        latest: dict[Any, Tensor] = {}

        def hook(module: Any, args: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            if not self.run.recomputing:  # otherwise the part is already computed
                latest[module] = part(first)
            first = first + latest[module]
            return (first, *out[1:]) if isinstance(out, tuple) else first

        with ExitStack() as hooks:
            for module in self.modules:
                hooks.enter_context(module.register_forward_hook(hook))
            yield


def _attention(model: Any) -> list[Any]:
    """Return the outermost modules whose class name ends in Attention."""
    attention: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in attention)
        if type(module).__name__.endswith("Attention") and not inside:
            attention[name] = module
    return list(attention.values())
