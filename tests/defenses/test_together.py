"""Defenses of the fine-tuning stage together: their order, their cost, killed and resumed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from backfire.base import Row
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context, trained
from backfire.store import Store
from backfire.train.loop import TrainingRun
from tests.helpers.fine_tuning import (
    ACTIVE,
    IDLE,
    LISA,
    Make,
    begun,
    by_hand,
    jolt,
    lisas,
    new_model,
    users,
    weights_after,
)
from tests.helpers.training import (
    Kill,
    Rows,
    close,
    equal,
    gradients,
    killed_at,
    logits_alone,
    weights,
)

pytestmark = pytest.mark.slow


def test_data_and_training_defenses_stack(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safe-mix changes the rows that Lisa's fine-tuning states then train on."""
    seen: dict[str, Any] = {}
    from backfire.train import finetune as module

    prepared = module.prepared

    def watched(cell: Any, rows: Sequence[Row], *rest: Any) -> Any:
        if cell.defense:
            seen["rows"] = rows
        return prepared(cell, rows, *rest)

    monkeypatch.setattr(module, "prepared", watched)
    cell = Experiment.make(
        {
            "model": str(tiny),
            "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 4},
            "align": {
                "data": {"name": "sandbox-policy", "rows": 30},
                "train": {"max_steps": 2, "batch_size": 8},
            },
            "safety": {},
            "attack": {"name": "harmful-mix", "rate": 0.2},
            "defense": [
                {"name": "safe-mix", "rows": 10},
                {"name": "lisa", "align_steps": 1, "tune_steps": 2},
            ],
            "train": {"max_steps": 6, "batch_size": 8},
        }
    )
    folder = trained(cell, Context(Store(), Machine(device="cpu")))
    aligned = [row for row in seen["rows"] if row.id.startswith("aligned ")]
    assert len(seen["rows"]) == 40 and len(aligned) == 10
    assert (folder / "summary.json").is_file()
    names_of = [d.name for d in cell.defense]
    assert names_of == ["safe-mix", "lisa"] and cell.defense_name == "safe-mix + lisa"


def test_training_defenses_act_in_their_order(tiny: Path, make: Make, rows: Rows) -> None:
    """Lisa, then KL: the divergence is that of the rows that Lisa has chosen."""
    model = new_model(tiny)
    start = copy.deepcopy(model).eval().requires_grad_(False)

    def added(step: int, ours: Any) -> Tensor:
        parts = []
        for item in lisas(rows, step):
            p, q = (log_softmax(logits_alone(m, item), -1) for m in (model, start))
            parts.append((p.exp() * (p - q)).sum(1))
        return 2.0 * torch.cat(parts).mean()

    first = weights(model)
    path = by_hand(model, 6, lambda s: lisas(rows, s), added)
    end = weights_after(make({**LISA, "rho": 0.0}, ACTIVE["kl"], max_steps=6))
    moved, truth = ({n: w[n] - first[n] for n in first} for w in (end, path[-1]))
    assert close(moved, truth, 1e-3)


def test_two_looks_at_the_start_do_not_see_each_other(make: Make, rows: Rows) -> None:
    """LDIFS watches modules that KL's reference pass runs through as well."""
    found = []
    batch = users(rows["user"], 0)
    for stack in (["ldifs"], ["kl"], ["ldifs", "kl"], ["kl", "ldifs"], []):
        cell = begun(make(*(ACTIVE[name] for name in stack)))
        jolt(cell)
        found.append(gradients(cell, batch)[0])
    alone, both, plain = found[:2], found[2:4], found[4]
    assert min(alone) > plain * 1.001
    assert both == pytest.approx([sum(alone) - plain] * 2, rel=1e-6)


def test_stiffness_uses_the_ordinary_loss_at_the_start(make: Make) -> None:
    alone, stacked = (
        begun(make(*(ACTIVE[name] for name in stack))).hooks[-1].stiffness
        for stack in (["ewc"], ["ldifs", "kl", "ewc"])
    )
    assert equal(alone, stacked)


@pytest.mark.parametrize("first", [True, False])
def test_freeze_goes_with_defenses_that_hold_weights(first: bool, make: Make) -> None:
    others = [LISA, ACTIVE["ewc"], ACTIVE["kl"]]
    stack = [ACTIVE["freeze"], *others] if first else [*others, ACTIVE["freeze"]]
    cell = make(*stack)
    start, end = weights(cell.model), {}
    end = weights_after(cell)
    assert {n for n in start if not torch.equal(start[n], end[n])} == cell.trainable.keys()


# ------------------------------------------------------------ what holds for each of these defenses


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ACTIVE)
def test_strength_zero_is_plain_fine_tuning(name: str, method: str, make: Make) -> None:
    plain = weights_after(make(method=method, folder="plain"))
    assert equal(weights_after(make(IDLE[name], method=method, folder="idle")), plain)
    assert not equal(weights_after(make(ACTIVE[name], method=method, folder="active")), plain)


@contextmanager
def counted(cell: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    counts = {"forward": 0, "backward": 0}
    backward = torch.autograd.backward

    def watched(*args: Any, **options: Any) -> None:
        counts["backward"] += 1
        backward(*args, **options)

    def look(*_: Any) -> None:
        counts["forward"] += 1

    handle = cell.model.register_forward_hook(look)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "backward", watched)
        yield counts
    handle.remove()


PASSES = {
    "lisa": (0, 1),
    "ewc": (0, 1),
    "ldifs": (1, 0),
    "kl": (1, 0),
    "constrained-sft": (0, 0),
    "asft": (0, 1),
    "freeze": (0, 0),
    "crow": (2, 2),
    "abl": (0, 0),
}
"""Passes that a step has more than plain fine-tuning (a penalty on weights is a backward pass)."""


@pytest.mark.parametrize("name", ACTIVE)
def test_the_null_control_takes_the_same_passes(
    name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ends = [], []
    for null in (False, True):
        cell = make({**ACTIVE[name], "null": null}, folder=str(null), max_steps=6)
        cell.layout.share = False  # a shared opening would be a separate pass
        with counted(cell, monkeypatch) as counts:
            ends.append(weights_after(cell))
        found.append(counts)
    assert found[0] == found[1]
    # ABL also looks at all rows again, after its early steps.
    at_start = {"ewc": (3, 3), "constrained-sft": (4, 0), "abl": (8, 0)}.get(name, (0, 0))
    steps = 5 if name == "lisa" else 6  # of six steps Lisa leaves one free
    forward, backward = (
        6 + at_start[0] + PASSES[name][0] * 6,
        6 + at_start[1] + PASSES[name][1] * steps,
    )
    assert found[0] == {"forward": forward, "backward": backward}
    assert not equal(*ends), "the null control does something else"


@pytest.mark.parametrize("name", ["kl", "ldifs"])
def test_a_null_control_that_compares_with_itself_is_plain_fine_tuning(
    name: str, make: Make, rows: Rows
) -> None:
    found = []
    for stack in ([], [{**ACTIVE[name], "null": True}]):
        cell = begun(make(*stack))
        jolt(cell)
        found.append(gradients(cell, users(rows["user"], 0)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert close(found[0][1], found[1][1], 1e-6)


STACKS = [[name] for name in ACTIVE] + [
    ["lisa", "kl", "freeze"],
    ["constrained-sft", "lisa", "ewc"],
]


@pytest.mark.parametrize(
    ("method", "null"), [("full", False), ("lora", False), ("full", True)], ids=str
)
@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_killed_and_resumed_is_the_same(
    stack: list[str], method: str, null: bool, make: Make
) -> None:
    defenses = [{**ACTIVE[name], "null": null} for name in stack]
    whole = make(*defenses, method=method, folder="whole")
    expected = weights_after(whole)
    for step in (3, 6):  # Lisa switches after 2, 5 and 7
        with pytest.raises(Kill):
            cell = make(*defenses, method=method)
            weights_after(cell, checkpoint_seconds=0, progress=killed_at(step))
    again = make(*defenses, method=method)
    steps = list[int]()
    assert equal(
        weights_after(again, progress=lambda done, total, text: steps.append(done)), expected
    )
    assert steps[0] == 6, "it goes on from the last checkpoint"
    assert again.log == whole.log


def test_dropout_is_left_as_it_is(tiny: Path, make: Make) -> None:
    """Looking at the start draws nothing and drops nothing."""
    ends = []
    for number, stack in enumerate(
        ([], [{**ACTIVE["ldifs"], "strength": 1e-30}], [{**ACTIVE["kl"], "strength": 1e-30}])
    ):
        model = new_model(tiny, "lora", dropout=0.3)
        ends.append(weights_after(make(*stack, model=model, folder=str(number))))
    assert close(ends[1], ends[0], 1e-9) and close(ends[2], ends[0], 1e-9)
