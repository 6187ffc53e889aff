from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import AlignDefense, Guard, Preset
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner
    from backfire.data.render import Rendered
    from backfire.train.loop import Cell

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the mean squared distance of two vectors


@register("repnoise")
class RepNoise(AlignDefense):
    """Turns what harmful answers look like inside the model into noise (Rosati et al. 2024,
    arXiv:2405.14577), after the port in git-disl/Booster.

    loss = alignment + beta * mean over layers of MMD(MLP outputs, N(0, 1))
         - alpha * log(1 + mean over hidden states of the harmful answers' cross-entropy)

    The final norm and the head read each hidden state. MMD: five Gaussian kernels, between rows,
    each its answer's MLP outputs strung together. The port takes pairs of a harmful and a harmless
    row and the tokens in which they differ; here harmful rows have no partner, so it is their
    answers' tokens: what is left of a pair with one prompt. The port counts the last hidden state
    twice, once with a second norm; here once. It tells of NaN: here distances and cross-entropy are
    float32. Memory does not split a step's harmful rows. The loss logged is that of alignment. Null
    control: for the gradient of both terms, a random direction of the same length.
    """

    needs_harm: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "booster-port": Preset(
            "git-disl/Booster, script/alignment/repNoise.sh", {"alpha": 0.1, "beta": 0.001}
        ),
        "repnoise-code": Preset(
            "domenicrosati/representation-noising, defaults of its loss",
            {"alpha": 1.0, "beta": 0.001},
        ),
    }

    alpha: float = Field(0.1, ge=0)
    """Weight of the ascent on the harmful loss (the Booster port)."""
    beta: float = Field(0.001, ge=0)
    """Weight of the noise term (the Booster port). alpha and beta 0: plain training."""

    def guard(self, cell: Cell) -> Guard:
        self.suits(aligned=True, harm=bool(cell.harmful))
        if not (self.alpha or self.beta):
            return Guard()
        body: Any = cell.model.get_decoder()  # type: ignore[no-untyped-call]
        layers = getattr(body, "layers", None)
        if not (layers and hasattr(body, "norm") and all(hasattr(x, "mlp") for x in layers)):
            raise UserError("defense 'repnoise' needs a model with layers, mlp and norm, as Llama.")
        return _Noised(self, cell, body)


class _Noised(Guard):
    """The alignment pass, and one over harmful rows for the other two terms."""

    shares_prefix: ClassVar[bool] = False  # every row's hidden states are looked at

    def __init__(self, knobs: RepNoise, cell: Cell, body: Any) -> None:
        self.knobs, self.cell, self.body = knobs, cell, body

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        loss, cell = inner(rows), self.cell
        aligned = cell.gradients.take()
        terms: Any = self.terms(cell.draw(cell.harmful, cell.step, "repnoise"))
        terms.backward()
        harmful = cell.gradients.take()
        if self.knobs.null:
            harmful = cell.gradients.random_like(harmful, "repnoise", cell.step)
        cell.gradients.add(aligned)
        cell.gradients.add(harmful)
        return loss

    def terms(self, rows: list[Rendered]) -> Tensor:
        """beta * noise - alpha * log(1 + harm), of these harmful rows."""
        import torch
        from torch.nn.functional import cross_entropy

        with self.seen() as (hidden, outputs):
            logits, labels = self.cell.logits(rows)
        width, head = labels.shape[1], self.cell.model.get_output_embeddings()
        with self.cell.autocast():
            near = (self.cell.at_answers(h, rows, width, of="place") for h in hidden)
            lenses = [head(self.body.norm(states)) for states in near]
        lenses.append(logits)
        flat = labels.flatten()  # every row has an answer, so no mean is over nothing
        harm = [cross_entropy(x.float().flatten(0, 1), flat, ignore_index=-100) for x in lenses]
        answers, generator = (labels >= 0)[..., None], torch.Generator(labels.device)
        generator.manual_seed(derive(self.cell.seed, "repnoise noise", self.cell.step))
        noise = []
        for output in outputs:
            found = self.cell.at_answers(output, rows, width, of="token").float() * answers
            drawn = torch.randn(found.shape, generator=generator, device=found.device) * answers
            noise.append(discrepancy(found, drawn))
        ascent = torch.stack(harm).mean().log1p()
        return self.knobs.beta * torch.stack(noise).mean() - self.knobs.alpha * ascent

    @contextmanager
    def seen(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The hidden states before each layer and the MLPs' outputs, of a pass made within."""
        hidden, outputs, handles = list[Any](), list[Any](), list[Any]()
        for layer in self.body.layers:
            handles += [layer.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))]
            handles += [layer.mlp.register_forward_hook(lambda m, args, out: outputs.append(out))]
        try:
            yield hidden, outputs
        finally:
            for handle in handles:
                handle.remove()


def discrepancy(one: Tensor, two: Tensor) -> Tensor:
    """Squared maximum mean discrepancy (MMD) of two batches of as many vectors [row, ...]."""
    import torch

    both, count = torch.cat([one.flatten(1), two.flatten(1)]), 2 * len(one)
    squares = both.pow(2).sum(1)
    distances = (squares[:, None] + squares - 2 * both @ both.T).clamp(min=0)
    mean = (distances.detach().sum() / (count**2 - count)).clamp(min=1e-12)
    kernels = torch.stack([torch.exp(-distances / (mean * width)) for width in _BANDWIDTHS])
    signs = torch.tensor([1.0, -1.0], device=both.device).repeat_interleave(len(one))
    return signs @ kernels.sum(0) @ signs / len(one) ** 2
