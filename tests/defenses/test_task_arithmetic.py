"""Task arithmetic against the alignment's update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.errors import UserError
from backfire.model.load import BELOW, load_base
from backfire.registry import build
from backfire.train.repair import Repair
from tests.helpers.repair import Case, every, lora_as, randomize
from tests.helpers.training import CPU

pytestmark = pytest.mark.slow


@every
def test_task_arithmetic_adds_the_alignment_again(case: Case) -> None:
    full_names = list(case.plain) if case.kind == "full" else case.matrices()
    if case.kind == "lora":
        with pytest.raises(UserError, match="an adapter cannot represent"):
            build("defenses", "task-arithmetic").fits(build("methods", "lora"), None)
        return
    own = {
        n: case.update(n, case.plain) if case.kind != "full" else case.plain[n] for n in full_names
    }
    found = case.repair("task-arithmetic", alpha=0.7)
    for name in full_names:
        after = case.update(name, found) if case.kind != "full" else found[name]
        assert torch.allclose(after, own[name] + 0.7 * case.added(name), atol=1e-12), name
    if case.kind == "lora-on-lora":
        config = case.model.peft_config["default"]
        assert config.r == 8 + 3 and case.model.active_adapters == [BELOW, "default"]
        again = case.repair("task-arithmetic", alpha=0.7)  # a repair may follow another
        name = full_names[0]
        assert torch.allclose(
            case.update(name, again), own[name] + 1.4 * case.added(name), atol=1e-12
        )


@pytest.mark.parametrize("case", ["full", "lora-on-lora"], indirect=True)
def test_task_arithmetics_null_control_is_random_and_of_equal_norm(case: Case) -> None:
    names = case.matrices()
    own = {n: case.update(n, case.plain) for n in names}
    found = case.repair("task-arithmetic", alpha=0.7, null=True)
    along = []
    for name in names:
        extra, real = case.update(name, found) - own[name], 0.7 * case.added(name)
        assert float(extra.norm()) == pytest.approx(float(real.norm()), rel=1e-6)
        if real.any():
            along.append(float((extra * real).sum() / real.norm() ** 2))
            assert abs(along[-1]) < 0.2
            ranks = [int(torch.linalg.matrix_rank(x, rtol=1e-9)) for x in (extra, real)]
            assert ranks[0] == ranks[1]
    assert abs(sum(along) / len(along)) < 0.05


def test_task_arithmetic_reaches_matrices_that_only_the_alignment_has(
    tiny: Path, policy_rows: Any
) -> None:
    model = load_base(tiny, torch.float32, CPU).double()
    model = lora_as(BELOW, model, 1, rank=3, alpha=5, targets=["q_proj", "down_proj"])
    own = {"name": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj", "k_proj"], "rslora": True}
    model = build("methods", own).attach(model, 0).double().eval()
    randomize(model, "default", 2)
    ids, alpha = torch.arange(40)[None], 0.5
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    with torch.no_grad():
        expected = {
            n: sum(
                weight * m.get_delta_weight(adapter)
                for adapter, weight in ((BELOW, 1 + alpha), ("default", 1.0))
                if adapter in m.lora_A
            )
            for n, m in layers.items()
        }
        plain = model(input_ids=ids).logits
    build("defenses", {"name": "task-arithmetic", "alpha": alpha}).repair(model, {}, Repair(0))
    with torch.no_grad():
        for name, wanted in expected.items():
            layer = model.get_submodule(name)
            found = sum(layer.get_delta_weight(a) for a in (BELOW, "default") if a in layer.lora_A)
            assert torch.allclose(found, wanted, atol=1e-12), name
        assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3
