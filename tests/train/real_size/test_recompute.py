"""Layers that are recomputed give the same gradients and keep less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered, TrainHook
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.train.loop import TrainingRun
from tests.helpers.real_size import DEFENSES, TRAINED, both_ways, close
from tests.helpers.training import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "method"), both_ways([None, *DEFENSES, "dp", "freeze"]))
def test_recomputed_layers_give_the_same_gradients(
    name: str | None, method: str, new: Callable[..., TrainingRun]
) -> None:
    """A contract of every training defense, whatever its hooks look at."""
    pytest.importorskip("opacus") if name == "dp" else None
    own = {"dp": {"name": "dp", "epsilon": None}, "freeze": "freeze", **DEFENSES}
    found = []
    for recompute in (False, True):
        cell = new(*([own[name]] if name else []), method=method, recompute=recompute, folder="x")
        passes: list[bool] = []

        def look(*_: Any, cell: TrainingRun = cell, passes: list[bool] = passes) -> None:
            passes.append(cell.recomputing)

        for layer in cell.model.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(look)
        run(cell, micro_batch=3)
        found.append(cell.weights())
        assert any(passes) == recompute
    assert close(*found, 1e-5 if name != "vaccine" else 1e-4)


@pytest.mark.parametrize("method", [m for m in TRAINED if m != "full"])
def test_recomputed_layers_suit_every_method(method: str, new: Callable[..., TrainingRun]) -> None:
    found = []
    for recompute in (False, True):
        cell = new(method={"name": method}, recompute=recompute, folder=f"{recompute}")
        run(cell)
        found.append(cell.weights())
    assert close(*found)


def test_recomputed_layers_drop_the_same(new: Callable[..., TrainingRun]) -> None:
    found = []
    for recompute in (False, True):
        cell = new(
            method={"name": "lora", "dropout": 0.3}, recompute=recompute, folder=f"{recompute}"
        )
        run(cell)
        found.append(cell.weights())
    assert close(*found)


def test_recomputed_layers_keep_less(
    new: Callable[..., TrainingRun], items: list[Rendered]
) -> None:
    kept = []
    for recompute in (False, True):
        cell, sizes = new(recompute=recompute, folder=f"{recompute}"), dict[int, int]()
        cell.layout.share, _ = False, cell.model.train()
        own = {p.data_ptr() for p in cell.model.parameters()}

        def pack(tensor: Tensor, sizes: Any = sizes, own: Any = own) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cell.logits(items)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


def test_a_model_whose_layers_cannot_be_run_again_is_refused(
    new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def refuse(self: Any, *args: Any) -> None:
        raise ValueError(f"{type(self)} does not support gradient checkpointing.")

    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        monkeypatch.setattr(PreTrainedModel, name, refuse, raising=False)
    with pytest.raises(UserError, match="--recompute is not supported by models of type 'llama'"):
        new(recompute=True)


def test_a_defense_that_would_mistake_a_second_run_is_refused(
    new: Callable[..., TrainingRun],
) -> None:
    """Such as a defense that adds noise to some layers."""

    class Noisy(TrainHook):
        def __init__(self, cell: TrainingRun) -> None:
            self.cell, self.calls = cell, 0

        def look(self, scale: float, module: Any, args: Any, out: Tensor) -> Tensor:
            self.calls += 1
            return out + scale * self.calls

        def step(self, rows: list[Rendered], inner: Any) -> Tensor:
            layer = self.cell.model.get_decoder().layers[0]
            handle = layer.mlp.register_forward_hook(partial(self.look, 0.1))
            try:
                loss: Tensor = inner(rows)
            finally:
                handle.remove()
            return loss

    for recompute in (False, True):
        cell = new(DEFENSES["ldifs"], recompute=recompute, folder=f"{recompute}")
        cell.hooks.append(Noisy(cell))
        if not recompute:
            run(cell)
            continue
        with pytest.raises(UserError, match="cannot be combined with the defense of Noisy"):
            run(cell)


def test_recompute_is_excluded_from_the_hash() -> None:
    assert Machine().recompute is False and "recompute" not in str(Experiment.model_fields)
