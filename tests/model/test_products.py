"""The faster library gives the same products, and only where it may."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from backfire.model import products
from backfire.model.products import fast_products, linear
from tests.helpers.families import tiny_model

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def _this_processor_gains_by_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch lacks oneDNN")
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    yield


def seen(model: Any) -> list[torch.Tensor]:
    """Logits, and the gradients of all weights."""
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    model.zero_grad()
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def test_logits_and_gradients_are_the_same_but_for_rounding() -> None:
    model = tiny_model("llama", attention_bias=True)
    alone = seen(model)
    with fast_products(model):
        assert "_Linear" in model.lm_head(model.model.embed_tokens(IDS)).grad_fn.name()
        fast = seen(model)
    for one, other in zip(fast, alone, strict=True):
        assert float((one - other).norm()) <= 2e-6 * float(other.norm()) + 1e-12
    assert all(map(torch.equal, seen(model), alone))


def test_second_derivatives_pass_through_it() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(9, 9, requires_grad=True) for _ in range(2))

    def second(product: Any) -> torch.Tensor:
        [first] = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)
        [found] = torch.autograd.grad(first.pow(2).sum(), weight)
        return found

    wanted = second(nn.functional.linear)
    assert float((second(linear) - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_other_types_and_few_rows_keep_torchs_products() -> None:
    model = tiny_model("llama")
    with fast_products(model, "bfloat16"):
        assert not any("forward" in vars(module) for module in model.modules())
    with fast_products(model.bfloat16()):
        assert not any("forward" in vars(module) for module in model.modules())
    weight = torch.randn(4, 3)
    for rows in (0, 7):
        x = torch.randn(rows, 3)
        assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))
    assert torch.equal(
        linear(weight.double(), weight.double()), weight.double() @ weight.double().T
    )


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    model = tiny_model("llama")
    own = lambda states: states.new_zeros(*states.shape[:-1], 7)  # noqa: E731
    model.lm_head.forward = own
    with fast_products(model):
        assert vars(model.lm_head)["forward"] is own
    assert vars(model.lm_head)["forward"] is own


def test_few_prepared_products_stay_in_memory(capfd: pytest.CaptureFixture[str]) -> None:
    """Of 1,024, as torch keeps by itself, the first would still be there."""
    weight = torch.randn(16, 16)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        for rows in (8, *range(9, 80), 8):
            linear(torch.randn(rows, 16), weight)
    made = [x for x in capfd.readouterr().out.splitlines() if "create:cache_miss" in x]
    assert sum("mb8ic16oc16" in line for line in made) == 2
