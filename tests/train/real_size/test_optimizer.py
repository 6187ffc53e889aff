"""Weight decay, and the optimizer's first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from backfire.errors import CellError
from backfire.train.loop import TrainingRun
from tests.helpers.real_size import close
from tests.helpers.training import run

pytestmark = pytest.mark.slow

DORA = {"name": "lora", "dora": True}


@pytest.mark.parametrize("method", ["full", "lora", DORA, "llama-adapter"])
def test_what_transformers_decays_is_decayed(method: Any, new: Callable[..., TrainingRun]) -> None:
    from transformers import Trainer

    cell = new(method=method, weight_decay=0.1)
    theirs = set(Trainer.get_decay_parameter_names(None, cell.model))  # type: ignore[arg-type]
    groups = [group for group in cell.optimizer.param_groups if group["weight_decay"]]
    ours = {id(p) for group in groups for p in group["params"]}
    assert {n for n, p in cell.trainable.items() if id(p) in ours} == theirs & cell.trainable.keys()
    flat = {n for n, p in cell.trainable.items() if p.ndim == 1 and id(p) in ours}
    assert any("magnitude" in n for n in flat) == (method is DORA)
    assert len(ours) < len(cell.trainable) or method != "full", "norms are not"


def test_a_pass_through_other_rows_leaves_none_out(new: Callable[..., TrainingRun]) -> None:
    cell = new()
    steps = [cell.draw(cell.aligned, step, "x") for step in range(4)]
    assert [len(rows) for rows in steps] == [8, 3, 8, 3]
    for one, two in (steps[:2], steps[2:]):
        assert sorted(map(id, [*one, *two])) == sorted(map(id, cell.aligned))
    assert steps[0] != steps[2], "each pass in its own order"


@pytest.mark.parametrize("times", [1, 99])
def test_the_optimizers_first_step_is_taken_once(
    times: int, new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out between its groups: the first has moved, and must not move again."""
    plain, cell = (new(folder=name, weight_decay=0.1) for name in ("plain", "short"))
    run(plain)
    make, left = cell.optimizer._init_group, [times]  # type: ignore[attr-defined]

    def short(group: Any, *args: Any) -> Any:
        if group["weight_decay"] == 0 and left[0]:
            left[0] -= 1
            # As it does in the middle of making a weight's state.
            cell.optimizer.state[group["params"][-1]]["step"] = torch.zeros(())
            raise torch.OutOfMemoryError("no room for AdamW's moments")
        return make(group, *args)

    monkeypatch.setattr(cell.optimizer, "_init_group", short)
    if times == 1:
        run(cell)
        assert left == [0] and close(plain.weights(), cell.weights(), 1e-7)
        assert [x["gradient_norm"] for x in plain.log] == [x["gradient_norm"] for x in cell.log]
        return
    with pytest.raises(CellError, match=r"optimizer's step: AdamW keeps 0\.0 GB") as caught:
        run(cell)
    assert caught.value.kind == "oom"
