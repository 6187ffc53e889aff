"""Safe LoRA against the projection of the update."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from backfire.registry import build
from tests.helpers.repair import Case, changed, every

pytestmark = pytest.mark.slow


def frobenius(v: Tensor) -> Tensor:
    return v @ v.T / v.norm()


def projector(v: Tensor) -> Tensor:
    return v @ torch.linalg.pinv(v.T @ v, rtol=1e-9, hermitian=True) @ v.T


FORMS = {"frobenius": frobenius, "projector": projector}


@every
@pytest.mark.parametrize("form", FORMS)
def test_safe_lora_projects_the_update(case: Case, form: str) -> None:
    found = case.repair("safe-lora", form=form, num_matrices=1000)
    aligned = [n for n in case.matrices() if case.added(n).any()]
    assert len(aligned) == (6 if case.kind == "lora-on-lora" else 14)
    for name in case.matrices():
        before, after = case.update(name, case.plain), case.update(name, found)
        if name not in aligned:
            assert torch.equal(after, before)
            continue
        wanted = FORMS[form](case.added(name)) @ before
        assert torch.allclose(after, wanted, atol=1e-9), name
        assert (
            case.kind == "lora-on-lora"
            or form == "frobenius"
            or wanted.shape[0] > 32
            or (torch.allclose(after, before, atol=1e-9))
        ), "of a V of full rank the true projector is the identity"
    touched = {n for n in changed(case, found) if "default" in n}
    assert all("lora_B" in n for n in touched)
    if case.kind == "full":
        left = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
        assert not left & changed(case, found)


@pytest.mark.parametrize("case", ["lora-on-lora"], indirect=True)
@pytest.mark.parametrize(("form", "settles"), [("projector", True), ("frobenius", False)])
def test_only_the_true_projector_is_idempotent(case: Case, form: str, settles: bool) -> None:
    knobs = {"form": form, "num_matrices": 1000}
    once, twice = case.repair("safe-lora", **knobs), case.repair("safe-lora", **knobs)
    names = [n for n in case.matrices() if case.added(n).any()]
    for name in names:
        one, two = case.update(name, once), case.update(name, twice)
        assert torch.allclose(one, two, atol=1e-9) == settles
        assert not torch.allclose(one, case.update(name, case.plain), atol=1e-3)


def cosines(case: Case, form: str) -> dict[str, float]:
    found = {}
    for name in case.matrices():
        if case.added(name).any():
            before = case.update(name, case.plain)
            after = FORMS[form](case.added(name)) @ before
            both = before.norm() * after.norm()
            found[name] = float((before * after).sum() / both)
    return found


def projected(case: Case, state: Mapping[str, Tensor]) -> set[str]:
    return {
        n
        for n in case.matrices()
        if not torch.equal(case.update(n, state), case.update(n, case.plain))
    }


@every
@pytest.mark.parametrize("null", [False, True])
def test_safe_lora_chooses_the_lowest_cosines(case: Case, null: bool) -> None:
    known = cosines(case, "frobenius")
    order = sorted(known, key=known.__getitem__)
    assert known[order[3]] - known[order[2]] > 1e-9
    found = case.repair("safe-lora", num_matrices=3, null=null)
    assert projected(case, found) == set(order[:3])


@every
@pytest.mark.parametrize("null", [False, True])
def test_safe_lora_chooses_by_threshold(case: Case, null: bool) -> None:
    known = cosines(case, "frobenius")
    order = sorted(known, key=known.__getitem__)
    middle = (known[order[3]] + known[order[4]]) / 2
    found = case.repair("safe-lora", select="threshold", threshold=middle, null=null)
    assert projected(case, found) == set(order[:4])


@pytest.mark.parametrize("form", FORMS)
def test_safe_loras_null_control_has_the_spectrum_but_another_subspace(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(24, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    defense = build("defenses", {"name": "safe-lora", "form": form})
    v, eye = v.double(), torch.eye(24, dtype=torch.float64)
    true = defense.subspace(v)(eye)
    assert torch.allclose(true, FORMS[form](v), atol=1e-9)
    overlap = []
    for seed in range(40):
        other = defense.subspace(v, seed)(eye)
        assert torch.allclose(other, other.T, atol=1e-9)
        assert torch.allclose(torch.linalg.eigvalsh(other), torch.linalg.eigvalsh(true), atol=1e-9)
        overlap.append(float((other * true).sum()))
    # Of two independent subspaces: trace times trace over the dimension.
    chance = float(true.trace()) ** 2 / 24
    assert sum(overlap) / 40 == pytest.approx(chance, rel=0.25)
    assert chance < 0.5 * float((true * true).sum())


def test_rounding_of_a_merged_adapter_adds_no_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 48, generator=generator)
    base = torch.randn(64, 48, generator=generator)
    v = (base + 0.001 * low) - base
    assert torch.linalg.matrix_rank(v, rtol=1e-7) == 48
    found = build("defenses", {"name": "safe-lora", "form": "projector"}).subspace(v)
    assert float(found(torch.eye(64)).trace()) == pytest.approx(4, abs=1e-3)
