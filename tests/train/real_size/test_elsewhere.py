"""Casts, drift read from disk, and checkpoints that resume with other settings or elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.model.load import load_base
from backfire.registry import build
from backfire.train import drift
from backfire.train.loop import TrainingRun
from backfire.train.precision import disable_adapter_casts
from tests.helpers.real_size import DEFENSES, close
from tests.helpers.training import CPU, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("knobs", [{}, {"dora": True}, {"dropout": 0.2}], ids=str)
def test_adapters_do_not_copy_their_input(
    knobs: dict[str, Any], tiny: Path, items: list[Rendered]
) -> None:
    """In bfloat16 products: the same loss to the bit, in less memory."""
    losses, kept = [], []
    for lean in (False, True):
        model = load_base(tiny, torch.bfloat16, CPU)
        model = build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0).train()
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
        if lean:
            disable_adapter_casts(model)
        sizes = dict[int, int]()

        def pack(tensor: Tensor, sizes: Any = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(0)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            ids = torch.tensor([row.ids[:16] for row in items[:8]])
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        losses.append((loss.item(), grads))
        kept.append(sum(sizes.values()))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))
    assert kept[1] < kept[0] or knobs.get("dora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_of_large_models_is_read_from_disk(
    dtype: torch.dtype, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(tiny, dtype, CPU).float().requires_grad_(True)
    named = dict(model.named_parameters())
    kept = drift.Origin(named, tiny)
    monkeypatch.setattr(drift, "_IN_MEMORY", 0)
    read = drift.Origin(named, tiny)
    assert not read.copies and len(read.on_disk) == len(named) and not kept.on_disk
    assert read.moved(named) == kept.moved(named) == 0
    with torch.no_grad():
        for p in named.values():
            p.add_(0.01)
    size = sum(p.numel() for p in named.values())
    assert kept.moved(named) == pytest.approx(0.01 * math.sqrt(size), rel=1e-3)
    assert read.moved(named) == pytest.approx(kept.moved(named), rel=1e-9)
    fewer = {name: named[name] for name in list(named)[:3]}  # a defense has frozen the rest
    assert read.moved(fewer) == pytest.approx(kept.moved(fewer), rel=1e-9)
    other = drift.Origin(named, tiny)  # weights that no file has stay in memory
    assert not other.on_disk and other.moved(named) == 0
    monkeypatch.setattr(drift, "_AT_MOST", 10)
    assert drift.Origin(named, tiny).moved(named) is None


@pytest.mark.parametrize("name", [None, "lisa", "ewc", "constrained-sft", "repnoise", "vaccine"])
def test_a_killed_run_may_go_on_split_another_way(
    name: str | None, new: Callable[..., TrainingRun]
) -> None:
    defenses = [DEFENSES[name]] if name else []
    plain = new(*defenses, folder="plain", max_steps=4)
    run(plain)
    killed = new(*defenses, folder="killed", max_steps=4)

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, checkpoint_seconds=0, progress=stop)
    again = new(*defenses, folder="killed", max_steps=4, recompute=True)
    begun = list[int]()
    run(again, micro_batch=3, progress=lambda done, total, text: begun.append(done))
    assert begun[0] == 3, "it went on after its second step"
    assert close(plain.weights(), again.weights(), 2e-4)
    assert [x["loss"] for x in plain.log] == pytest.approx([x["loss"] for x in again.log], rel=1e-4)


def test_a_checkpoint_may_go_on_elsewhere(
    new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved on a GPU says so, and this machine has none."""
    from torch import serialization

    class Kill(Exception):  # noqa: N818
        pass

    def killed(done: int, total: int, text: str) -> None:
        if (done, total) == (3, 4):
            raise Kill

    defense = {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0}
    plain = new(defense, method="lora", folder="plain", max_steps=4)
    run(plain)
    cell = new(defense, method="lora", max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(serialization, "location_tag", lambda storage: "cuda:0")
        run(cell, checkpoint_seconds=0, progress=killed)
    again, steps = new(defense, method="lora", max_steps=4), list[int]()
    run(again, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3
    assert all(torch.equal(again.trainable[n], w) for n, w in plain.weights().items())
