"""Passes are split when memory runs out, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered, TrainDefense
from backfire.errors import CellError
from backfire.registry import find, names
from backfire.train import loop
from backfire.train.batches import answer_logits
from backfire.train.loop import TrainingRun
from backfire.train.microbatch import MicroBatches
from tests.helpers.real_size import DEFENSES, both_ways, close
from tests.helpers.training import run

pytestmark = pytest.mark.slow


def test_the_passes_of_every_training_defense_are_tried() -> None:
    trains = {n for n in names("defenses") if issubclass(find("defenses", n), TrainDefense)}
    assert trains - {*DEFENSES, "dp", "freeze"} == set(), "dp goes row by row, freeze has no pass"


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, cell: TrainingRun, tokens: int, error: Exception
) -> list[int]:
    """From now on the model has no room for a pass of more padded tokens; returns their sizes."""
    seen: list[int] = []

    def check(module: Any, args: Any, knobs: Any) -> None:
        seen.append(knobs["input_ids"].numel())
        if seen[-1] > tokens:
            raise error

    cell.model.register_forward_pre_hook(check, with_kwargs=True)
    return seen


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA Error: out of memory at line 380 in file /src/csrc/pythonInterface.cpp"),
    MemoryError(),
]


@pytest.mark.parametrize(("name", "method"), both_ways([None, *DEFENSES]))
def test_every_pass_is_split_when_memory_runs_out(
    name: str | None, method: str, new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass over the start, those of the steps, and those over other rows."""
    defenses = [DEFENSES[name]] if name else []
    plain = new(*defenses, method=method, folder="plain")
    plain.layout.share = False  # sizes are then those of whole rows
    run(plain)
    cell = new(*defenses, method=method, folder="short")
    cell.layout.share = False
    longest = max(len(row.ids) for row in [*cell.items, *cell.aligned, *cell.harmful])
    error = ERRORS[len(name or "") % len(ERRORS)]
    seen = short_of_memory(monkeypatch, cell, 2 * longest, error)
    run(cell)
    assert max(seen) > 2 * longest >= min(seen), "memory ran out, and then did not"
    assert close(plain.weights(), cell.weights(), 2e-4)
    assert [x["loss"] for x in plain.log] == pytest.approx([x["loss"] for x in cell.log], rel=1e-4)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: f"{type(e).__name__} {str(e)[:9]}")
def test_every_out_of_memory_error_is_recognized(
    error: Exception, new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = new()
    short_of_memory(monkeypatch, cell, 100, error)
    run(cell)
    cell = new(folder="none")
    short_of_memory(monkeypatch, cell, 3, error)
    with pytest.raises(CellError, match="with one row at a time") as caught:
        run(cell)
    assert caught.value.kind == "oom"


def test_another_error_is_none_of_memory(
    new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = new()
    short_of_memory(monkeypatch, cell, 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(cell)


def test_one_long_batch_does_not_split_the_others(
    new: Callable[..., TrainingRun], items: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, most = new(max_steps=8), 16 * max(len(row.ids) for row in items)
    ids = items[0].ids
    long = Rendered(items[0].row, [*ids[:5], *[9] * 300, *ids[5:]], items[0].num_prompt + 300)
    cell.items, cell.layout.share = [long, *items[1:]], False
    cell.layout.longest_packed = 0  # sizes are then those of padded rows
    sizes = list[tuple[int, int]]()

    def small(model: Any, batch: Any) -> Tensor:
        sizes.append(tuple(batch.ids.shape))
        if batch.ids.numel() > most:
            raise torch.OutOfMemoryError("no room")
        return answer_logits(model, batch)

    monkeypatch.setattr(loop, "answer_logits", small)
    run(cell)
    # Of the two steps of an epoch one has the long row.
    assert sum(rows == 8 and width < 300 for rows, width in sizes) == 4
    assert sum(rows * width > most for rows, width in sizes) in (1, 2), "the first time only"
    assert sum(width > 300 for _, width in sizes) >= 4, "it is learned from"


def test_a_row_that_was_left_over_is_not_the_last_resort(items: list[Rendered]) -> None:
    batches, rows, tries = MicroBatches(), [items[0]] * 5, list[list[int]]()
    batches.tokens = 4 * len(items[0].ids)

    def work() -> None:
        tries.append([])
        for part in batches.split(rows):
            tries[-1].append(len(part))
            if len(part) == 1 and max(tries[-1]) > 2:
                raise ERRORS[0]

    batches.retry(work)
    assert tries == [[4, 1], [2, 2, 1]]


def test_rows_of_like_length_share_a_pass(items: list[Rendered]) -> None:
    def tokens(parts: Sequence[Sequence[Rendered]]) -> int:
        return sum(len(part) * max(len(row.ids) for row in part) for part in parts)

    parts = list(MicroBatches(4).split(items))
    assert [len(part) for part in parts] == [4] * 4
    assert sorted(map(id, (row for part in parts for row in part))) == sorted(map(id, items))
    in_order = [items[i : i + 4] for i in range(0, 16, 4)]
    useful = sum(len(row.ids) for row in items)
    assert tokens(parts) < 1.2 * useful < tokens(in_order)
    assert list(MicroBatches().split(items)) == [list(items)], "what fits stays in its order"
