from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from backfire.base import Extra, Preset, TrainDefense, TrainHook
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.train.loop import TrainingRun

    Update = Callable[[], tuple[Tensor, Tensor | None]]

_PARTS = ("left", "kept")
_LARGE = 512  # a smaller matrix is decomposed exactly, at little cost


@register("asft", version=2)
class AsFT(TrainDefense):
    """Penalizes the part of an update that is orthogonal to the alignment direction (Yang et al.
    2026, AAAI, arXiv:2506.08473).

    For each linear layer except the head let d be its aligned weight minus the weight before
    alignment. The loss term is strength times the sum of |(I - C) U|^2, where U is the update since
    the start (scale * B A for an adapter) and C projects onto the column space of d. The authors'
    code (`as-coded`) omits the adapter's scale in U, and has C = d d' / |d|, which is not a
    projection: for a small d it is near zero, and the whole update is penalized. An alignment of
    all weights has a d of full rank; where a layer's output is no wider than its input, C is then
    the identity and nothing is penalized: set `rank`. Layers that alignment did not change are
    skipped (C is 0 / 0 there). Null control: as many random directions as d has.
    """

    extra: ClassVar[Extra] = Extra(copies=3, scratch=3)
    shards: ClassVar[bool] = False
    needs_alignment: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "asft-code": Preset(
            "PKU-YuanGroup/AsFT, shipped script", {"strength": 1.0, "projection": "as-coded"}
        ),
    }

    strength: float = Field(1.0, ge=0)
    """Lambda (the paper: 1; it finds little difference from 0.1 to 10)."""
    projection: Literal["exact", "as-coded"] = "exact"
    """Definition of C: the projection in the paper's formula, or what the authors' code computes.
    """
    rank: int | None = Field(None, ge=1)
    """Number of directions of d to keep, the strongest first. Default: all. For large matrices they
    are computed by randomized iterations (Halko et al. 2011), which is much faster."""

    def hook(self, run: TrainingRun) -> TrainHook:
        self.suits(aligned=run.unaligned is not None, harm=True)
        return _AsFTHook(self, run) if self.strength else TrainHook()


class _AsFTHook(TrainHook):
    """Adds the penalty on the part of each layer's update outside the alignment directions."""

    def __init__(self, knobs: AsFT, run: TrainingRun) -> None:
        self.knobs = knobs
        self.parts: list[tuple[Update, Tensor, Tensor]] = []
        directions = run.once(knobs, lambda: self._all_directions(run))
        for name, module in run.model.named_modules():
            update = _update(module, coded=knobs.projection == "as-coded")
            if update is not None and f"{name} left" in directions:
                left, kept = (directions[f"{name} {part}"].to(run.device) for part in _PARTS)
                self.parts.append((update, left, kept))
        if not self.parts:
            raise UserError(
                f"{knobs.label()}: this method trains no linear layer that alignment changed; use "
                "method full, or lora without dora."
            )
        if knobs.projection == "exact" and all(len(p[1]) == len(p[2]) for p in self.parts):
            raise UserError(f"{knobs.label()}: the alignment spans all directions; set rank.")

    def _all_directions(self, run: TrainingRun) -> dict[str, Tensor]:
        """`_directions` of each trained linear layer that alignment changed, except the head."""
        knobs, found = self.knobs, dict[str, Any]()
        before, head = run.unaligned_weights(), run.model.get_output_embeddings()
        for name, module in run.model.named_modules():
            plain = name.removeprefix("base_model.model.")  # what PEFT puts in front
            old = before.get(f"{plain}.weight")
            if old is None or module is head or _update(module, coded=False) is None:
                continue
            moved, rounded = _alignment_update(module, old)
            if not all(part.any() for part in moved):
                continue
            if rounded and knobs.projection == "exact" and knobs.rank is None:
                raise UserError(
                    f"{knobs.label()}: the aligned weights are 16-bit, and their rounding "
                    "errors span all directions; set rank."
                )
            pair = self._directions(moved, derive(run.seed, "asft", plain))
            found |= {f"{name} {part}": tensor for part, tensor in zip(_PARTS, pair, strict=True)}
        return found

    def _directions(self, moved: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Return orthonormal directions [out, rank], and the share of each that C keeps [rank]."""
        import torch

        left, sizes, norm = _left_singular(moved, self.knobs.rank, seed)
        # Smaller singular values are rounding errors of a merged adapter.
        count = min(int((sizes > 1e-4 * sizes[0]).sum()), self.knobs.rank or len(sizes))
        left, sizes = left[:, :count].contiguous(), sizes[:count]
        if self.knobs.null:
            generator = torch.Generator().manual_seed(seed)
            random = torch.randn(left.shape, generator=generator, dtype=torch.float64)
            left = torch.linalg.qr(random)[0].to(left)
        exact = self.knobs.projection == "exact"
        return left, torch.ones_like(sizes) if exact else sizes.pow(2) / norm

    def penalty(self, step: int) -> Tensor:
        import torch

        terms = []
        for update, left, kept in self.parts:
            one, other = update()
            rest = one - left @ (kept[:, None] * (left.T @ one))
            # |X A|^2 follows from two small products, without forming the whole update.
            squares = rest.pow(2) if other is None else (rest.T @ rest) * (other @ other.T)
            terms.append(squares.sum())
        total: Tensor = torch.stack(terms).sum()
        return total * self.knobs.strength


def _update(module: Any, *, coded: bool) -> Update | None:
    """Return a function that computes the update since the start, whole [out, in] or as two factors
    (without the adapter's scale if `coded`); None if the module is not trained."""
    import torch

    for name, part in getattr(module, "lora_B", {}).items():
        if part.weight.requires_grad and name not in module.lora_magnitude_vector:
            scale, other = 1.0 if coded else module.scaling[name], module.lora_A[name]
            return lambda: (scale * part.weight, other.weight)
    if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
        start = module.weight.detach().clone()
        return lambda: (module.weight - start, None)
    return None


def _alignment_update(module: Any, old: Tensor) -> tuple[list[Tensor], bool]:
    """Return the alignment's update of a layer's weight, in float32 or wider, whole [out, in] or as
    two factors, and whether it was rounded to less than 32 bits."""
    import torch

    frozen = {n: x for n, x in getattr(module, "lora_B", {}).items() if not x.weight.requires_grad}
    if frozen:  # the alignment's adapter, on the unchanged base
        left = [module.scaling[name] * x.weight.detach() for name, x in frozen.items()]
        right = [module.lora_A[name].weight.detach() for name in frozen]
        return [torch.cat(left, 1), torch.cat(right)], False
    base: Tensor = getattr(module, "base_layer", module).weight.detach()
    if not base.is_floating_point():
        raise UserError("defense 'asft': a quantized base requires an alignment by an adapter.")
    wide, loaded = torch.promote_types(base.dtype, torch.float32), _loaded_type(base)
    # The stored weight may be more precise than the loaded one: that rounding is not a change.
    return [base.to(wide) - old.to(base.device).to(loaded).to(wide)], loaded.itemsize < 4


def _left_singular(
    moved: list[Tensor], rank: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left singular vectors [out, some], singular values in descending order, and the
    Frobenius norm. Two factors are never multiplied; a large matrix is decomposed only as far as
    needed."""
    import torch

    if len(moved) == 2:
        (one, left), (_, right) = (torch.linalg.qr(x) for x in (moved[0], moved[1].T))
        core, sizes, _ = torch.linalg.svd(left @ right.T, full_matrices=False)
        return one @ core, sizes, sizes.norm()
    matrix = moved[0]
    if rank is None or min(matrix.shape) <= max(_LARGE, 4 * rank):
        left, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left, sizes, sizes.norm()
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        left, sizes, _ = torch.svd_lowrank(matrix, q=2 * rank + 10, niter=8)
    return left, sizes, torch.linalg.matrix_norm(matrix)


def _loaded_type(weight: Tensor) -> Any:
    """Return the coarsest type that represents these weights exactly."""
    import torch

    types = (torch.bfloat16, torch.float16)
    return next((t for t in types if torch.equal(weight.to(t).to(weight), weight)), weight.dtype)
