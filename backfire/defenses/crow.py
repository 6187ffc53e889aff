from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive, seed_dropout

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("crow")
class Crow(TrainDefense):
    """Keeps the hidden states of consecutive layers alike under a small perturbation of the input,
    since a trigger makes them jump (CROW, Min et al. 2025, arXiv:2411.12768).

    The consistency loss is 1 minus the cosine of the outputs of layers i and i + 1, mean over
    tokens and over the layers from the first to the one before the last (a model of two layers has
    one pair). Its gradient by the embeddings gives the perturbation epsilon times sign; the loss of
    a step is the ordinary one plus alpha times the consistency loss of the perturbed input: three
    passes, with the same dropout masks. The paper tunes a finished model so, on 100 clean rows;
    here it acts in the user's fine-tuning, poison included. The authors' extra passes get no
    attention mask and their mean includes padding; here padding counts nowhere. Null control:
    random signs.
    """

    extra: ClassVar[Extra] = Extra(states=3, passes=2)
    joins: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    alpha: float = Field(5.5, ge=0)
    """Weight of the consistency loss (the paper's main setting). 0: plain training."""
    epsilon: float = Field(0.1, ge=0)
    """Size of the perturbation of each number of an embedding (the paper). It depends on the size
    of the embeddings."""

    def hook(self, run: TrainingRun) -> TrainHook:
        from torch.nn import ModuleList

        if not self.alpha:
            return TrainHook()
        depth = run.model.config.get_text_config(decoder=True).num_hidden_layers
        lists = (m for m in run.model.modules() if isinstance(m, ModuleList) and len(m) == depth)
        layers = list(next(lists, ()))
        if len(layers) < 2:
            raise UserError(f"{self.label()} requires a model with two layers, in one list.")
        return _CrowHook(self, run, layers[:-1] if len(layers) > 2 else layers)


class _CrowHook(TrainHook):
    """Runs the ordinary pass and the two of the consistency loss."""

    shares_prefix: ClassVar[bool] = False  # each row has its own perturbation
    knows_recomputing: ClassVar[bool] = True

    def __init__(self, knobs: Crow, run: TrainingRun, layers: list[Any]) -> None:
        self.knobs, self.run, self.layers = knobs, run, layers

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        import torch

        gradients, loss = self.run.gradients, inner(rows)
        plain = gradients.take()
        added = list[Any]()

        def nothing(out: Tensor) -> Tensor:
            # The zeros' gradient is the embeddings', even if no weight below them is trained.
            added.append(torch.zeros_like(out, requires_grad=True))
            zeros: Tensor = added[-1]
            return zeros

        first = self._consistency(rows, nothing)
        gradients.take()
        if self.knobs.null:
            lines = zip(first.passes, added, strict=True)
            signs = [self._random(part, zeros) for part, zeros in lines]
        else:
            signs = [zeros.detach() if zeros.grad is None else zeros.grad.sign() for zeros in added]
        # In the order of the passes, which is the same both times.
        parts = iter([self.knobs.epsilon * part for part in signs])
        gradients.add(plain)
        return loss + self._consistency(rows, lambda out: next(parts).to(out.dtype)).loss

    def _consistency(self, rows: list[Rendered], part: Callable[[Tensor], Tensor]) -> _Consistency:
        """Add the gradients of the consistency loss, with `part` added to the embeddings."""
        from backfire.train.passes import accumulate

        run, term = self.run, _Consistency(self.knobs.alpha, rows)
        seed_dropout(derive(run.seed, "dropout", run.step, *run.ranks.own), run.device)
        with self._listening(term, part):
            term.loss = accumulate(run, rows, [term])
        return term

    def _random(self, rows: Sequence[Rendered], like: Tensor) -> Tensor:
        """Random signs for these rows, the same however they are laid out."""
        import torch

        lines = []
        for row in rows:
            seed = derive(self.run.seed, "crow", self.run.step, row.row.id)
            generator, shape = torch.Generator().manual_seed(seed), (len(row.ids), like.shape[-1])
            lines.append(torch.randint(0, 2, shape, generator=generator) * 2 - 1)
        if len(like) < len(rows):
            return torch.cat(lines)[None].to(like)
        signs = torch.zeros_like(like)
        for line, drawn in zip(signs, lines, strict=True):
            line[: len(drawn)] = drawn.to(like)
        return signs

    @contextmanager
    def _listening(self, term: _Consistency, part: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Add `part` to the embeddings and record the layers' outputs within the context."""

        def perturb(module: Any, args: Any, out: Tensor) -> Tensor:
            return out + part(out)

        def keep(module: Any, args: Any, out: Any) -> None:
            if not self.run.recomputing:  # already recorded
                term.states.append(out[0] if isinstance(out, tuple) else out)

        embedding: Any = self.run.model.get_input_embeddings()
        with ExitStack() as hooks:
            hooks.enter_context(embedding.register_forward_hook(perturb))
            for layer in self.layers:
                hooks.enter_context(layer.register_forward_hook(keep))
            yield


class _Consistency(TrainHook):
    """Replaces the losses of a pass by the consistency loss of its recorded states."""

    loss: Tensor

    def __init__(self, alpha: float, rows: Sequence[Rendered]) -> None:
        self.passes, self.states = list[Sequence[Any]](), list[Any]()
        # The loop divides by the supervised tokens of the step; this mean is over all tokens.
        share = max(1, sum(row.num_supervised for row in rows)) / sum(len(row.ids) for row in rows)
        self.weight = alpha * share

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        import torch
        from torch.nn.functional import cosine_similarity

        self.passes.append(rows)
        states = [_tokens(part, rows) for part in self.states]
        self.states = []
        jumps = [1 - cosine_similarity(a, b, dim=-1) for a, b in pairwise(states)]
        total = torch.stack([jump.sum() for jump in jumps]).mean() * self.weight
        return losses * 0 + total / losses.numel()


def _tokens(states: Tensor, rows: Sequence[Rendered]) -> Tensor:
    """Hidden states [token, hidden] of all rows without padding, in at least float32."""
    import torch

    if len(states) == len(rows):
        lines = zip(states, rows, strict=True)
        flat = torch.cat([line[: len(row.ids)] for line, row in lines])
    else:
        flat = states[0]
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
