from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import AlignDefense, Extra, Preset, TrainHook
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of the mean squared distance of two vectors


@register("repnoise", version=2)
class RepNoise(AlignDefense):
    """Turns the model's representations of harmful answers into noise (Rosati et al. 2024,
    arXiv:2405.14577), following the port in git-disl/Booster.

    loss = alignment + beta * mean over layers of MMD(MLP outputs, N(0, 1))
         - alpha * log(1 + mean over hidden states of the harmful answers' cross-entropy)

    Each hidden state is decoded by the final norm and the head. MMD: five Gaussian kernels between
    rows, each the concatenated MLP outputs of its answer. Both published codes draw a step's
    harmful and harmless rows separately, align them by position, cut or padded to one size, and use
    the positions where they differ. At the first of each run of such positions they set the logits
    to zero, so that its loss is the logarithm of the vocabulary size; and of the harmless rows they
    learn only those positions. None of this is done here, since harmful rows have no partner: all
    tokens of their answers count, and the alignment loss is the ordinary one. The port counts the
    last hidden state twice, once with a second norm; here once. It reports NaN: here distances and
    cross-entropy are float32. Only one hidden state's logits are in memory at a time. If memory
    splits a step's harmful rows, they are run twice; only rounding differs. The logged loss is that
    of alignment. Null control: a random direction of the same length as the gradient of both terms.
    """

    extra: ClassVar[Extra] = Extra(copies=2, logits=1.2, passes=1, by_row=True)
    joins: ClassVar[bool] = False
    shards: ClassVar[bool] = False
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

    def hook(self, run: TrainingRun) -> TrainHook:
        self.suits(aligned=True, harm=bool(run.harmful))
        if not (self.alpha or self.beta):
            return TrainHook()
        body: Any = run.model.get_decoder()  # type: ignore[no-untyped-call]
        layers = getattr(body, "layers", None)
        if not (layers and hasattr(body, "norm") and all(hasattr(x, "mlp") for x in layers)):
            raise UserError(
                "defense 'repnoise' requires a model with layers, mlp and norm, such as Llama."
            )
        return _RepNoiseHook(self, run, body)


@dataclass(frozen=True)
class _Recorded:
    """Activations of a forward pass at the answers, each [row, answer, width]."""

    hidden: list[Tensor]
    """Input of each layer, at the position where the token is predicted."""
    outputs: list[Tensor]
    """Output of each MLP, at the answer's tokens."""
    logits: Tensor
    labels: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.hidden, *self.outputs, self.logits]

    def detached(self) -> _Recorded:
        """Return a copy whose tensors are leaves that accumulate gradients."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(True)

        hidden, outputs = ([leaf(x) for x in part] for part in (self.hidden, self.outputs))
        return _Recorded(hidden, outputs, leaf(self.logits), self.labels)


class _RepNoiseHook(TrainHook):
    """Runs the alignment pass, and one over harmful rows for the other two terms."""

    shares_prefix: ClassVar[bool] = False  # the hidden states of every row are needed

    def __init__(self, knobs: RepNoise, run: TrainingRun, body: Any) -> None:
        self.knobs, self.run, self.body = knobs, run, body

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        loss, run = inner(rows), self.run
        aligned = run.gradients.take()
        self.terms(run.draw(run.harmful, run.step, "repnoise"))
        harmful = run.ranks.first(run.gradients.take())  # each rank runs all harmful rows
        if self.knobs.null:
            harmful = run.gradients.random_like(harmful, "repnoise", run.step)
        run.gradients.add(aligned)
        run.gradients.add(harmful)
        return loss

    def terms(self, rows: list[Rendered]) -> float:
        """Add the gradients of beta * noise - alpha * log(1 + harm) on these harmful rows, and
        return that value. The loss is first computed from detached activations, whose gradients are
        then passed back through the model: in a second pass if the rows do not fit into one."""
        import torch

        parts, recorded, live = list[Any](), list[_Recorded](), None
        for part in self.run.micro_batches.split(rows):
            whole = len(part) == len(rows)
            with torch.set_grad_enabled(whole):
                activations = self._run(part, len(parts))
            live = activations if whole else None
            parts.append(part)
            recorded.append(activations.detached())
            del activations
        value = self._harm(parts, recorded) + self._noise(rows, parts, recorded)
        for number, (part, one) in enumerate(zip(parts, recorded, strict=True)):
            again = live or self._run(part, number)
            pairs = zip(again.tensors(), one.tensors(), strict=True)
            grads = [(x, y.grad) for x, y in pairs if x.requires_grad and y.grad is not None]
            self.run.backward([x for x, _ in grads], [g for _, g in grads])
        return value

    def _harm(self, parts: list[list[Rendered]], recorded: list[_Recorded]) -> float:
        """Return -alpha log(1 + harm) and add its gradients, one lens and part at a time."""
        import torch
        from torch.nn.functional import cross_entropy

        count = sum(int((one.labels >= 0).sum()) for one in recorded)
        num_lenses, total = 1 + len(self.body.layers), 0.0

        def losses(one: _Recorded) -> Iterator[Tensor]:
            for lens in [*one.hidden, None]:
                with self.run.autocast():
                    logits = one.logits if lens is None else self._head(lens)
                flat = logits.float().flatten(0, 1)
                yield cross_entropy(flat, one.labels.flatten(), ignore_index=-100, reduction="sum")

        for part, one in zip(parts, recorded, strict=True):
            self.run.micro_batches.record(part)
            with torch.no_grad():
                total += sum(float(loss) for loss in losses(one))
        mean = total / count / num_lenses
        if not self.knobs.alpha:
            return 0.0
        for part, one in zip(parts, recorded, strict=True):
            self.run.micro_batches.record(part)
            for loss in losses(one):
                part_of_harm = loss * (-self.knobs.alpha / (1 + mean) / count / num_lenses)
                self.run.scaling.scaled(part_of_harm).backward()  # type: ignore[no-untyped-call]
        return -self.knobs.alpha * math.log1p(mean)

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.run.model.get_output_embeddings()(self.body.norm(hidden))
        return logits

    def _noise(
        self, rows: list[Rendered], parts: list[list[Rendered]], recorded: list[_Recorded]
    ) -> float:
        """Return beta times the mean discrepancy and add its gradients, layer by layer, with the
        rows in their original order."""
        import torch
        from torch.nn.functional import pad

        width = max(one.labels.shape[1] for one in recorded)
        place = {id(row): i for i, row in enumerate(rows)}
        order = torch.tensor([place[id(row)] for part in parts for row in part]).argsort()
        device, total = recorded[0].labels.device, 0.0

        def joined(tensors: list[Tensor], fill: float) -> Tensor:
            """Concatenate to [row, answer, ...], padded on the left."""
            flat = [pad(t.flatten(2), (0, 0, width - t.shape[1], 0), value=fill) for t in tensors]
            return torch.cat(flat)[order.to(device)]

        answers = joined([one.labels[..., None] for one in recorded], -100) >= 0
        generator = torch.Generator(device)
        generator.manual_seed(derive(self.run.seed, "repnoise noise", self.run.step))
        for layer in range(len(self.body.layers)):
            outputs = joined([one.outputs[layer] for one in recorded], 0).float() * answers
            drawn = torch.randn(outputs.shape, generator=generator, device=device) * answers
            term = discrepancy(outputs, drawn) * (self.knobs.beta / len(self.body.layers))
            self.run.scaling.scaled(term).backward()  # type: ignore[no-untyped-call]
            total += float(term.detach())
        return total

    def _run(self, rows: list[Rendered], number: int) -> _Recorded:
        """Run part `number` of the step's rows through the model."""
        import torch

        self.run.micro_batches.record(rows)
        torch.manual_seed(derive(self.run.seed, "repnoise dropout", self.run.step, number))
        with self._recording() as (hidden, outputs):
            logits, labels = self.run.logits(rows)
        width = labels.shape[1]
        return _Recorded(
            [self.run.at_answers(h, rows, width, of="place") for h in hidden],
            [self.run.at_answers(x, rows, width, of="token") for x in outputs],
            logits,
            labels,
        )

    @contextmanager
    def _recording(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Record each layer's input and each MLP's output of the pass made within the context."""
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
    """Squared maximum mean discrepancy (MMD) of two equally large batches of vectors [row, ...]."""
    import torch

    both, count = torch.cat([one.flatten(1), two.flatten(1)]), 2 * len(one)
    squares = both.pow(2).sum(1)
    distances = (squares[:, None] + squares - 2 * both @ both.T).clamp(min=0)
    mean = (distances.detach().sum() / (count**2 - count)).clamp(min=1e-12)
    kernels = torch.stack([torch.exp(-distances / (mean * width)) for width in _BANDWIDTHS])
    signs = torch.tensor([1.0, -1.0], device=both.device).repeat_interleave(len(one))
    return signs @ kernels.sum(0) @ signs / len(one) ** 2
