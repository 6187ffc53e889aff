"""AsFT against the update's part outside the alignment direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.errors import UserError
from backfire.experiment import Train
from backfire.model.load import BELOW, load_base, weights_of
from backfire.registry import build
from backfire.train.loop import TrainingRun
from tests.helpers.fine_tuning import ACTIVE, RATE, Make, jolt, penalty
from tests.helpers.training import CPU, Rows, close, exact, gradient_of

pytestmark = pytest.mark.slow


def beside(update: Tensor, moved: Tensor, projection: str, rank: int | None = None) -> Tensor:
    """|(I - C) update|^2, C written out."""
    if rank:
        left, sizes, right = torch.linalg.svd(moved, full_matrices=False)
        moved = left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank]
    if projection == "exact":
        c = moved @ torch.linalg.pinv(moved, rtol=1e-4)
    else:
        c = moved @ moved.T / moved.norm()
    return ((torch.eye(len(c)).to(c) - c) @ update).pow(2).sum()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("projection", ["exact", "as-coded"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_asft_restrains_directions_orthogonal_to_the_alignment(
    method: str, projection: str, tiny: Path, make: Make, unaligned: Path
) -> None:
    cell = make({**ACTIVE["asft"], "projection": projection}, method=method)
    guard: Any = cell.hooks[0]
    assert guard.penalty(0).item() == 0 and len(guard.parts) == 14
    old, new = weights_of(unaligned), weights_of(tiny)
    jolt(cell)
    total = torch.zeros((), dtype=torch.float64)
    for name, module in cell.model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            plain = name.removeprefix("base_model.model.") + ".weight"
            moved = new[plain].double() - old[plain].double()
            if method == "lora":
                scale = 32 / 4 if projection == "exact" else 1  # the authors' code leaves it out
                update = scale * module.lora_B["default"].weight @ module.lora_A["default"].weight
            else:
                update = module.weight - new[plain].double()
            total = total + 50.0 * beside(update, moved, projection)
    assert guard.penalty(1).item() == pytest.approx(total.item(), rel=1e-6)
    assert close(gradient_of(guard.penalty(1), cell), gradient_of(total, cell))


def test_asft_lets_the_direction_of_alignment_free(make: Make, unaligned: Path) -> None:
    cell = make(ACTIVE["asft"])
    null = make({**ACTIVE["asft"], "null": True}, model=cell.model)
    old, total = weights_of(unaligned), 0.0
    with torch.no_grad():
        for name, p in cell.trainable.items():
            update = 0.5 * (p - old[name])
            total += float(update.pow(2).sum()) if name.endswith("proj.weight") else 0.0
            p.add_(update)
    true, random = (c.hooks[0] for c in (cell, null))
    ranks = [[left.shape[1] for _, left, _ in vars(g)["parts"]] for g in (true, random)]
    assert ranks == [[3] * 14] * 2, "as many directions, rounding not among them"
    assert penalty(cell) < 1e-9
    # Random directions have next to no part in alignment's.
    assert 0.8 * 50 * total < penalty(null) < 50 * total


def test_a_resumed_run_reads_its_directions(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(ACTIVE["asft"])
    monkeypatch.setattr(first.hooks[0].__class__, "_directions", None)  # as if it cannot be called
    again, other = make(ACTIVE["asft"]), {**ACTIVE["asft"], "rank": 1}
    for one, two in zip(first.hooks[0].parts, again.hooks[0].parts, strict=True):  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))
    jolt(first)
    jolt(again)
    assert penalty(again) == penalty(first) > 0
    with pytest.raises(TypeError):
        make(other)


def test_asft_knows_an_alignment_that_is_an_adapter(tiny: Path, tmp_path: Path, rows: Rows) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = exact(load_base(tiny, torch.float32, CPU))
    both: Any = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=BELOW
    ).double()
    for name, p in both.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p)
    model = build("methods", {"name": "lora", "rank": 4}).attach(both, 0).double()
    cell = TrainingRun(
        model,
        rows["user"],
        Train.make({}),
        learning_rate=RATE,
        seed=5,
        folder=tmp_path,
        name="run",
        defenses=[build("defenses", ACTIVE["asft"])],
        aligned=rows["align"],
        unaligned=tiny,
    )
    guard: Any = cell.hooks[0]
    assert [left.shape for _, left, _ in guard.parts] == [(32, 2)] * 2, "those that alignment moved"
    jolt(cell)
    total = torch.zeros((), dtype=torch.float64)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            a, b = (getattr(module, f"lora_{x}") for x in "AB")
            moved = module.scaling[BELOW] * b[BELOW].weight @ a[BELOW].weight
            total = total + 50 * beside(
                8 * b["default"].weight @ a["default"].weight, moved.detach(), "exact"
            )
    assert guard.penalty(1).item() == pytest.approx(total.item(), rel=1e-6)


def test_asft_needs_directions_orthogonal_to_the_alignment(
    tiny: Path, make: Make, tmp_path: Path
) -> None:
    other: Any = load_base(tiny, torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    other.save_pretrained(str(tmp_path / "other"))
    cell = make()
    for name, p in cell.trainable.items():
        p.requires_grad_("q_proj" in name)  # square, so that a full rank is everything
    cell.unaligned = tmp_path / "other"
    with pytest.raises(UserError, match="spans all directions; set rank"):
        build("defenses", "asft").hook(cell)
    cell.hooks = [build("defenses", {**ACTIVE["asft"], "rank": 5}).hook(cell)]
    start, old = cell.weights(), weights_of(cell.unaligned)
    jolt(cell)
    total = sum(
        float(beside(p.detach() - start[n], start[n] - old[n].double(), "exact", rank=5))
        for n, p in cell.trainable.items()
        if p.requires_grad
    )
    assert penalty(cell) == pytest.approx(50 * total, rel=1e-6)


def test_asft_takes_no_rounding_for_alignment(tiny: Path, make: Make, tmp_path: Path) -> None:
    """Of weights that were loaded in 16 bits, those that alignment left alone did not move."""
    stored: Any = load_base(tiny, torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in stored.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    stored.save_pretrained(str(tmp_path / "stored"))
    cell = make(method="lora")
    aligned = []
    with torch.no_grad():
        for name, module in cell.model.named_modules():
            if (base := getattr(module, "base_layer", None)) is not None:
                plain = name.removeprefix("base_model.model.")
                base.weight.copy_(stored.get_submodule(plain).weight.bfloat16())
                if name.endswith("0.self_attn.q_proj"):
                    left, right = (torch.randn(32, 2, generator=generator) for _ in range(2))
                    base.weight.add_((0.3 * left @ right.T).to(base.weight))
                    base.weight.copy_(base.weight.bfloat16())
                    aligned.append(name)
    cell.unaligned = tmp_path / "stored"
    with pytest.raises(UserError, match="rounding errors span all directions; set rank"):
        build("defenses", "asft").hook(cell)
    guard: Any = build("defenses", {"name": "asft", "rank": 2}).hook(cell)
    assert len(guard.parts) == len(aligned) == 1


@pytest.mark.parametrize("method", ["ia3", {"name": "lora", "dora": True}, "same"])
def test_asft_is_refused_where_it_cannot_work(method: Any, tiny: Path, make: Make) -> None:
    model = load_base(tiny, torch.float32, CPU)
    same = method == "same"
    cell = make(model=build("methods", "full" if same else method).attach(model, 0))
    if same:
        cell.unaligned = tiny
    with pytest.raises(UserError, match="trains no linear layer that alignment changed"):
        build("defenses", "asft").hook(cell)
