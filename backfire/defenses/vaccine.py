from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import AlignDefense, Preset, TrainHook
from backfire.errors import UserError
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("vaccine")
class Vaccine(AlignDefense):
    """Aligns under the worst small perturbation of what the attention modules put out (Huang et al.
    2024, arXiv:2402.01109).

    Two passes a step. The first gives the gradient g of the loss by each attention module's output;
    the second is run with rho * g / (2-norm of all g together + 1e-7) added to those outputs, and
    its gradient and its loss are those of the step. Both passes drop the same (in the authors' code
    each its own). Rows of a step that memory splits share one norm. Null control: a random
    perturbation of the same norm, on the tokens that g is not zero at; the first pass is run all
    the same. (The authors' own random control adds noise of variance rho to every coordinate.) What
    it draws, alone of all this, depends on how memory splits a step.
    """

    presets: ClassVar[Mapping[str, Preset]] = {
        "vaccine-script": Preset("git-disl/Vaccine, README and paper", {"rho": 2.0}),
        "booster-port": Preset("git-disl/Booster, script/alignment/vaccine.sh", {"rho": 5.0}),
    }

    rho: float = Field(2.0, ge=0)
    """2-norm of the perturbation over all attention modules, rows and tokens of a step. The default
    is the paper's, for 7B; it has to suit the size of the activations. 0: plain training."""

    def hook(self, run: TrainingRun) -> TrainHook:
        if not self.rho:
            return TrainHook()
        modules = _attention(run.model)
        if not modules:
            raise UserError("defense 'vaccine' finds no attention module in this model.")
        return _Perturbed(self, run, modules)


class _Perturbed(TrainHook):
    """What is added to the attention modules' outputs, and the two passes."""

    shares_prefix: ClassVar[bool] = False  # each row has a perturbation of its own
    knows_recomputing: ClassVar[bool] = True

    def __init__(self, knobs: Vaccine, run: TrainingRun, modules: list[Any]) -> None:
        self.knobs, self.run, self.modules = knobs, run, modules

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        import torch

        gradients = self.run.gradients
        earlier, added = gradients.take(), list[Any]()

        def nothing(out: Tensor) -> Tensor:
            # Zeros, whose gradient is that of the output, even where no weight below it is trained.
            added.append(torch.zeros_like(out, requires_grad=True))
            zeros: Tensor = added[-1]
            return zeros

        with self.adding(nothing):
            inner(rows)
        gradients.take()
        found = {
            f"{place}": zeros.detach() if zeros.grad is None else zeros.grad
            for place, zeros in enumerate(added)
        }
        norm = gradients.norm(found.values())
        if self.knobs.null:
            found = gradients.random_like(found, "vaccine", self.run.step)
        # In the order in which the modules are run: it is the same in both passes.
        parts = iter([g * (self.knobs.rho / (norm + 1e-7)) for g in found.values()])
        with self.adding(lambda out: next(parts).to(out.dtype)):
            loss = inner(rows)
        gradients.add(earlier)
        return loss

    @contextmanager
    def adding(self, part: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within it, `part` of each attention module's output is added to that output."""
        latest: dict[Any, Tensor] = {}

        def hook(module: Any, args: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            if not self.run.recomputing:  # else the module has had its part already
                latest[module] = part(first)
            first = first + latest[module]
            return (first, *out[1:]) if isinstance(out, tuple) else first

        handles = [module.register_forward_hook(hook) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _attention(model: Any) -> list[Any]:
    """The attention modules, by the name of their class; of one in another, the outer one."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if type(module).__name__.endswith("Attention") and not inside:
            found[name] = module
    return list(found.values())
