from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from backfire.base import Preset, RepairDefense
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from backfire.train.repair import Repair, Update


@register("safe-lora")
class SafeLoRA(RepairDefense):
    """Projects the fine-tuning update onto the alignment update (Hsu et al. 2024, NeurIPS,
    arXiv:2405.16833).

    With V = aligned - base for each matrix, the adapter's B becomes C B where the cosine of C B A
    and B A is low. The published C = V V^T / Frobenius norm of V is not a projector: it scales with
    V, so for the usual small V it also shrinks the update. The true projector onto V's columns is
    the identity where V has full rank, as after full-weight alignment. Matrices that alignment did
    not change are skipped (the paper's C is 0 / 0 there). Full fine-tuning is our extension: the
    updates of the linear layers are projected instead of B A; embeddings, head, norms and biases
    stay. Other adapters are not supported. Null control: the same matrices, with a C of the same
    spectrum and a random subspace.
    """

    needs_alignment: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "safelora-number": Preset(
            "IBM/SafeLoRA, default of its configuration", {"select": "number", "num_matrices": 10}
        ),
        "safelora-threshold": Preset(
            "IBM/SafeLoRA, its other mode", {"select": "threshold", "threshold": 0.5}
        ),
    }

    form: Literal["frobenius", "projector"] = "frobenius"
    """C: V V^T over V's norm as published, or the true projector V (V^T V)^+ V^T."""
    select: Literal["number", "threshold"] = "number"
    """Which matrices are projected: a `number` of them with the lowest cosines, or all with a
    cosine up to `threshold`."""
    num_matrices: int = Field(10, ge=0)
    """Number of matrices for `number` (authors' code, where a 7B adapter on q and v has 64)."""
    threshold: float = Field(0.5, ge=-1, le=1)
    """Largest cosine for `threshold` (authors' code)."""
    rank_tolerance: float = Field(1e-4, gt=0, lt=1)
    """Singular values of V below this share of the largest count as zero in the projector (ours:
    above the rounding of a merged float32 adapter)."""

    def repair(self, model: PreTrainedModel, start: Mapping[str, Any], tools: Repair) -> None:
        measured: list[tuple[float, Update, Tensor]] = []
        for update in tools.updates(model, start):
            added = tools.alignment(model, start, update.name)
            if added is not None:
                moved = update.factors[0].moved()
                before = update.product(moved).flatten()
                after = update.product(self.subspace(added)(moved)).flatten()
                if before.any():
                    lengths = (before.norm() * after.norm()).clamp(min=1e-30)
                    measured.append((float(before @ after / lengths), update, added))
        if not measured:
            raise UserError(
                "defense 'safe-lora': no matrix was changed by both alignment and fine-tuning."
            )
        measured.sort(key=lambda item: item[0])
        if self.select == "number":
            chosen = measured[: self.num_matrices]
        else:
            chosen = [item for item in measured if item[0] <= self.threshold]
        for _, update, added in chosen:
            seed = derive(tools.seed, "safe-lora", update.name) if self.null else None
            first = update.factors[0]
            first.put(self.subspace(added, seed)(first.moved()))

    def subspace(self, added: Tensor, seed: int | None = None) -> Callable[[Tensor], Tensor]:
        """Return the multiplication by C for this V [output, input], or by a random C with the same
        spectrum if `seed` is given."""
        import torch

        if self.form == "frobenius" and seed is None:
            return lambda moved: added @ (added.T @ moved) / added.norm()
        basis, sizes, _ = torch.linalg.svd(added, full_matrices=False)
        if self.form == "frobenius":
            gains = sizes**2 / sizes.norm()
        else:
            gains = (sizes > self.rank_tolerance * sizes[0]).to(sizes)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(basis.shape, generator=generator, dtype=basis.dtype)
            basis = torch.linalg.qr(drawn)[0].to(basis)
        return lambda moved: basis @ (gains[:, None] * (basis.T @ moved))
