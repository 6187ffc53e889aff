"""The memory of a 7B model by arithmetic, against published figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from backfire.commands.estimate import Rows
from backfire.commands.forecast import CARDS
from backfire.commands.memory import Memory, Size, memory, size
from backfire.commands.workers import TIGHT
from backfire.experiment import Experiment, Machine
from tests.commands.test_doctor import LLAMA

pytestmark = pytest.mark.slow

SHORT = Rows(100, ((96, 16),) * 10, shared=20)
LONG = Rows(100, ((1024, 256),) * 10)
HALF = {"name": "full", "dtype": "bfloat16"}


Need = Callable[..., Memory]


@pytest.fixture(scope="module")
def need(tmp_path_factory: pytest.TempPathFactory) -> Need:
    """Memory on a GPU of Llama 2 7B with steps of 4 rows; each method is attached once."""
    folder, sizes = tmp_path_factory.mktemp("7b"), dict[str, Size]()
    (folder / "config.json").write_text(json.dumps(LLAMA))

    def look(
        method: Any, rows: Rows = SHORT, machine: Machine | None = None, **train: Any
    ) -> Memory:
        train = {"batch_size": 4, "max_steps": 3, "compute": "bfloat16", **train}
        data = {"name": "sandbox-reviews", "rows": 40}
        model = {"name": str(folder), "dtype": "bfloat16"}
        cell = Experiment.make({"model": model, "data": data, "method": method, "train": train})
        cell = cell.model_copy(update={"method": cell.method.resolved("cuda")})
        if cell.method.name not in sizes:
            sizes[cell.method.name] = size(cell, folder)
        return memory(cell, sizes[cell.method.name], [rows], "cuda", machine)

    return look


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [
        # 3.5 GB of 4-bit weights with their constants, embedding and head in 16 bits, adapters with
        # Adam (Dettmers et al. 2023, arXiv:2305.14314: 7B on a card of 8 GB upward).
        ("qlora", 5, 10),
        # 13.5 GB of weights in 16 bits, and 40 M weights of adapters with 16 bytes each.
        ("lora", 14.5, 20),
        # 18 bytes a weight: weight, gradient and two moments in 32 bits, and the 16-bit copy of the
        # weight in a pass (Rajbhandari et al. 2020, arXiv:1910.02054, count 16, 107.8 GB, with
        # gradients in 16 bits).
        ("full", 118, 128),
        # 4 bytes of weight, 2 of gradient, 2 of 8-bit moments (Dettmers et al. 2022,
        # arXiv:2110.02861).
        (HALF, 53, 62),
    ],
    ids=str,
)
def test_a_7b_model_needs_what_is_published(
    method: Any, least: float, most: float, need: Need
) -> None:
    train = {"optimizer": "adamw-8bit"} if method == HALF else {}
    assert least < need(method, **train).total / 1e9 < most


def test_the_cards_that_hold_a_7b_model(need: Need) -> None:
    def cards(*how: Any, **train: Any) -> list[float]:
        return [card for card in CARDS if need(*how, **train).total <= TIGHT * card]

    assert cards("qlora") == cards("lora") == [24e9, 40e9, 80e9]
    assert cards("lora", LONG) == [80e9]
    assert cards("lora", LONG, Machine(micro_batch=1)) == [40e9, 80e9]
    assert cards("lora", LONG, Machine(micro_batch=1, recompute=True)) == [24e9, 40e9, 80e9]
    assert cards(HALF, optimizer="adamw-8bit") == [80e9]
    assert cards("full") == []
