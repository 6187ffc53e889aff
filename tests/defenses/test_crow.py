"""CROW against its loss, row by row, from the states that transformers returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM

from backfire.errors import UserError
from backfire.model.batching import ways
from backfire.model.load import load_base
from backfire.registry import build
from tests.helpers.families import KINDS, tiny_model
from tests.helpers.fine_tuning import Make, jolt
from tests.helpers.loop import lora
from tests.helpers.training import CPU, Rows, close, exact, gradient_of, gradients, loss_of

pytestmark = pytest.mark.slow

BIG = {"name": "crow", "alpha": 5.5, "epsilon": 0.02}
"""The embeddings of the tiny model are about 0.02."""


def new_model(tiny: Path, method: str, layers: int = 4) -> Any:
    config = AutoConfig.from_pretrained(str(tiny), num_hidden_layers=layers)
    torch.manual_seed(3)
    model = exact(AutoModelForCausalLM.from_config(config))
    ways(model)  # found out before an adapter is attached, as when a base is loaded
    return model if method == "full" else lora(model).double()


def consistency(model: Any, embeds: Any) -> Any:
    """Sum over the tokens of a row."""
    out = model(inputs_embeds=embeds, output_hidden_states=True)
    first, second, third = out.hidden_states[1:4]  # without the embedding and the last of 4 layers
    jumps = [1 - cosine_similarity(*pair, dim=-1) for pair in ((first, second), (second, third))]
    return sum(jump.sum() for jump in jumps) / 2


def mean_consistency(model: Any, batch: Any) -> torch.Tensor:
    """Each row alone, its embeddings moved up the gradient; the sum over the rows' tokens."""
    embedding, parts = model.get_input_embeddings(), []
    for item in batch:
        ids = torch.tensor([item.ids])
        plain = embedding(ids).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(consistency(model, plain), plain)
        parts.append(consistency(model, embedding(ids) + 0.02 * slope.sign()))
    return torch.stack(parts).sum() / sum(len(item.ids) for item in batch)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_its_gradient_is_that_of_the_perturbed_consistency(
    method: str, packed: bool, tiny: Path, make: Make, rows: Rows
) -> None:
    cell = make(BIG, model=new_model(tiny, method))
    jolt(cell)
    cell.layout.longest_packed *= packed
    batch = rows["user"][:6]
    assert len({len(item.ids) for item in batch}) > 1
    loss, found = gradients(cell, batch)
    ordinary = loss_of(cell.model, batch)
    expected = ordinary + 5.5 * mean_consistency(cell.model, batch)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert close(found, gradient_of(expected, cell))
    assert loss > float(ordinary.detach()) + 1e-3


@pytest.mark.parametrize("method", ["qlora", "lora-int8", "llama-adapter"])
def test_it_goes_with_a_quantized_base_and_other_adapters(
    method: str, tiny: Path, tmp_path: Path, make: Make, rows: Rows
) -> None:
    config = AutoConfig.from_pretrained(str(tiny), num_hidden_layers=4)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    made = build("methods", method)
    base = load_base(tmp_path / "base", torch.float32, CPU, made.quantization("cpu"))
    cell = make(BIG, model=made.attach(base, 0))
    jolt(cell)
    batch = rows["user"][:6]
    loss, found = gradients(cell, batch)
    expected = loss_of(cell.model, batch) + 5.5 * mean_consistency(cell.model, batch)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-2)
    assert close(found, gradient_of(expected, cell), 0.1)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mixtral"])
def test_it_finds_the_layers_of_other_models(kind: str, make: Make, rows: Rows) -> None:
    model = tiny_model(KINDS.get(kind, (kind, {}))[0]).requires_grad_(True)
    hook: Any = make(BIG, model=model).hooks[0]
    depth = model.config.num_hidden_layers
    assert len(hook.layers) == max(2, depth - 1)
    assert len({type(layer) for layer in hook.layers}) == 1


def test_its_null_control_has_random_signs(tiny: Path, make: Make, rows: Rows) -> None:
    batch = rows["user"][:6]
    added = {}
    for null in (False, True):
        cell = make({**BIG, "null": null}, model=new_model(tiny, "full"), folder=f"{null}")
        cell.layout.longest_packed = 0
        seen: list[Any] = []
        embedding = cell.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        given: list[Any] = []
        first = cell.model.model.layers[0]
        first.register_forward_pre_hook(lambda module, args, given=given: given.append(args[0]))
        gradients(cell, batch)
        assert len(given) == 3
        added[null] = given[2] - embedding(seen[2])
        assert torch.allclose(given[1], embedding(seen[1])), "the second pass is not perturbed"
    for part in added.values():
        for line, item in zip(part, batch, strict=True):
            size = line[: len(item.ids)].abs()
            assert torch.allclose(size, torch.full_like(size, 0.02), atol=1e-12)
            assert not line[len(item.ids) :].any(), "padding stays as it is"
    same = (added[True].sign() == added[False].sign())[added[False] != 0].double().mean()
    assert 0.4 < float(same) < 0.6


def test_a_model_of_one_layer_is_refused(tiny: Path, make: Make) -> None:
    with pytest.raises(UserError, match="two layers"):
        make("crow", model=new_model(tiny, "full", layers=1))
