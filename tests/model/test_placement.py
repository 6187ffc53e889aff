"""A base that is larger than one GPU is placed on several, and never beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.errors import UserError
from backfire.model.load import skeleton
from backfire.model.placement import assert_placed, device_map, spread

NF4 = {"load_in_4bit": True}
CUDA = torch.device("cuda")


@pytest.fixture
def bare(tiny: Path) -> Any:
    return skeleton(tiny)


def size(model: Any) -> int:
    return sum(4 * p.numel() for p in model.parameters())


def test_layers_are_spread_evenly_over_gpus_that_are_too_small_alone(bare: Any) -> None:
    room = dict.fromkeys((0, 1), 0.9 * size(bare))
    found = spread(bare, torch.float32, {}, room)
    assert set(found.values()) == {0, 1}
    placed = {0: 0, 1: 0}
    for name, p in bare.named_parameters():
        (place,) = {gpu for part, gpu in found.items() if f"{name}.".startswith(f"{part}.")}
        placed[place] += 4 * p.numel()
    assert sum(placed.values()) == size(bare)
    assert max(placed.values()) < 0.75 * size(bare)


def test_a_base_that_fits_stays_on_one_gpu(bare: Any) -> None:
    assert spread(bare, torch.float32, {}, dict.fromkeys((0, 1), 2.0 * size(bare))) == {}
    room = dict.fromkeys((0, 1), 0.9 * size(bare))
    assert spread(bare, torch.float32, {}, room)
    assert spread(bare, torch.bfloat16, {}, room) == {}
    assert spread(bare, torch.float32, NF4, room) == {}


def test_too_little_memory_is_one_sentence(bare: Any) -> None:
    with pytest.raises(UserError, match=r"2 GPUs have 0\.0 GB free; use method qlora") as error:
        spread(bare, torch.float32, {}, dict.fromkeys((0, 1), 0.3 * size(bare)))
    assert str(error.value).count(". ") == 0


def test_only_a_device_without_a_number_is_spread(
    bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (0.9 * size(bare), 0))
    assert set(device_map(bare, torch.float32, CUDA, {}).values()) == {0, 1}
    for device in (torch.device("cuda:1"), torch.device("cpu")):
        assert device_map(bare, torch.float32, device, {}) == {"": str(device)}


def test_a_silent_offload_is_an_error(bare: Any, model: Any, tiny: Path) -> None:
    assert_placed(model, torch.device("cpu"), tiny)
    with pytest.raises(UserError, match="was put on 'meta' instead of 'cuda'"):
        assert_placed(bare, CUDA, tiny)
