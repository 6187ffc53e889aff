"""How many tokens are held at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backfire.train.microbatch import tokens_that_fit
from backfire.train.optimizer import first_step_bytes

GB = 2**30


def model(device: str) -> Any:
    shape = SimpleNamespace(hidden_size=4096, num_hidden_layers=32, vocab_size=32000)
    config = SimpleNamespace(get_text_config=lambda decoder: shape)
    return SimpleNamespace(config=config, device=torch.device(device))


def test_the_first_step_allocates_gradients_and_optimizer() -> None:
    weights = {"a": torch.nn.Parameter(torch.zeros(10, 20))}
    half = {"a": torch.nn.Parameter(torch.zeros(10, 20, dtype=torch.bfloat16))}
    assert first_step_bytes(weights, "adamw") == 200 * (4 + 8)
    assert first_step_bytes(half, "adamw-8bit") == 200 * (2 + 2.04)


def test_on_a_gpu_the_optimizer_has_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 GB of which 4 GB are in use; 6 GB come with the first step."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GB)
    before, each = tokens_that_fit(model("cuda"))
    after, same = tokens_that_fit(model("cuda"), 6 * GB)
    assert after / before == pytest.approx((12 - 6) / 12) and each == same
    assert tokens_that_fit(model("cuda"), 100 * GB)[0] == 256, "a pass is never empty"
    assert tokens_that_fit(model("cpu"), 6 * GB) == tokens_that_fit(model("cpu"))
