"""Defenses of the fine-tuning stage and of the data, against independent few-line references; and
what holds for every defense."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from backfire.base import DataDefense, Rendered, RepairDefense, Row, TrainDefense
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Train
from backfire.model.load import BELOW, load_base, weights_of
from backfire.pipeline import Context, trained
from backfire.registry import build, find, names
from backfire.rng import stream
from backfire.store import Store
from backfire.tokenizer import load_tokenizer
from backfire.train import loop
from backfire.train.batches import collate
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import accelerator_for
from backfire.train.repair import Repair

Rows = dict[str, list[Rendered]]
Make = Callable[..., TrainingRun]
CPU = torch.device("cpu")
RATE = 2e-3
LISA = {"name": "lisa", "rho": 5.0, "align_steps": 2, "tune_steps": 3}
ACTIVE: dict[str, dict[str, Any]] = {
    "lisa": LISA,
    "ewc": {"name": "ewc", "strength": 30.0},
    "ldifs": {"name": "ldifs", "strength": 2.0},
    "kl": {"name": "kl", "strength": 2.0},
    "constrained-sft": {"name": "constrained-sft"},
    "asft": {"name": "asft", "strength": 50.0},
    "freeze": {"name": "freeze", "lower_share": 0.5},
}
"""Each at a strength that shows within a few steps of the tiny model."""
IDLE: dict[str, dict[str, Any]] = {
    "lisa": {"name": "lisa", "align_steps": 0, "rho": 0.0},
    "ewc": {"name": "ewc", "strength": 0.0},
    "ldifs": {"name": "ldifs", "strength": 0.0},
    "kl": {"name": "kl", "strength": 0.0},
    "constrained-sft": {
        "name": "constrained-sft",
        "first_beta": 0.0,
        "early_beta": 0.0,
        "late_beta": 0.0,
    },
    "asft": {"name": "asft", "strength": 0.0},
    "freeze": {"name": "freeze", "lower_share": 0.0},
}
"""Each at strength zero."""


def exact(model: Any) -> Any:
    """In float64 throughout: Llama's norms would compute in float32."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(norm, module)
    return model.double()


def new_model(tiny: Path, method: str = "full", **knobs: Any) -> Any:
    """The tiny model in float64, as a method leaves it."""
    model = exact(load_base(tiny, torch.float32, CPU))
    if method == "full":
        return model.requires_grad_(True)
    return build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0).double()


@pytest.fixture(scope="module")
def rows(tiny: Path) -> Rows:
    """The user's rows, those of the alignment stage, and harmful ones; short, with one opening."""
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)
    sources = {
        "user": build("datasets", "sandbox-reviews").load("train"),
        "align": build("datasets", "sandbox-policy").load("train"),
        "harmful": build("datasets", {"name": "sandbox-policy", "part": "harmful"}).load("train"),
    }
    return {
        part: renderer.render(
            [
                Row(f"{part} {r.id}", "Please answer this.", r.prompt[-20:], r.answer)
                for r in rows[: 24 if part == "user" else 14]
            ]
        )
        for part, rows in sources.items()
    }


@pytest.fixture(scope="module")
def unaligned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model before an alignment that added something of rank 3 to each linear layer."""
    model: Any = load_base(tiny, torch.float32, CPU)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                left = torch.randn(module.out_features, 3, generator=generator)
                module.weight -= (
                    0.05 * left @ torch.randn(3, module.in_features, generator=generator)
                )
    folder = tmp_path_factory.mktemp("models") / "unaligned"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def make(tiny: Path, rows: Rows, unaligned: Path, tmp_path: Path) -> Callable[..., TrainingRun]:
    def cell(
        *defenses: Any, method: str = "full", folder: str = "run", **knobs: Any
    ) -> TrainingRun:
        (tmp_path / folder).mkdir(exist_ok=True)
        model = knobs.pop("model", None)
        settings = {"max_steps": 7, "batch_size": 6, "schedule": "constant", "warmup_share": 0}
        return TrainingRun(
            new_model(tiny, method) if model is None else model,
            knobs.pop("items", rows["user"]),
            Train.make({**settings, **knobs}),
            learning_rate=RATE,
            seed=5,
            folder=tmp_path / folder,
            name="run",
            defenses=[build("defenses", defense) for defense in defenses],
            aligned=rows["align"],
            harmful=rows["harmful"],
            unaligned=unaligned,
        )

    return cell


def run(cell: TrainingRun, **options: Any) -> dict[str, Tensor]:
    """The weights after training."""
    train([cell], accelerator_for(CPU, "float32"), **options)
    return weights(cell.model)


def begun(cell: TrainingRun) -> TrainingRun:
    """Its defenses have seen the start."""
    loop._begin(cell, accelerator_for(CPU, "float32"))
    return cell


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 1e-5) -> bool:
    assert one.keys() == two.keys()
    gap = sum(float((one[n] - two[n]).pow(2).sum()) for n in two)
    return gap <= tolerance**2 * sum(float(two[n].pow(2).sum()) for n in two)


def penalty(cell: TrainingRun) -> float:
    found = cell.hooks[0].penalty(1)
    assert found is not None
    return found.item()


def jolt(cell: TrainingRun, scale: float = 0.03) -> None:
    """Move every trainable weight a little, so that the model is no longer at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in cell.trainable.values():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


def gradients(
    cell: TrainingRun, batch: list[Rendered], size: int = 99
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step on these rows, as the loop has them."""
    cell.room.rows, cell.autocast = size, accelerator_for(CPU, "float32").autocast
    loss, _ = loop._gradients(cell, batch)
    return float(loss), {n: p.grad.clone() for n, p in cell.trainable.items() if p.grad is not None}


def said(model: Any, item: Rendered) -> Tensor:
    """Logits [token, vocab] of an answer, from the row alone: no padding, no prefix."""
    logits: Tensor = model(input_ids=torch.tensor([item.ids])).logits[0]
    return logits[item.num_prompt - 1 : -1]


def token_losses(model: Any, item: Rendered) -> Tensor:
    return cross_entropy(said(model, item), torch.tensor(item.answer_ids), reduction="none")


def loss_of(model: Any, batch: Sequence[Rendered]) -> Tensor:
    return torch.cat([token_losses(model, item) for item in batch]).mean()


def gradient_of(loss: Tensor, cell: TrainingRun) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(cell.trainable.values()), allow_unused=True)
    return {n: g for n, g in zip(cell.trainable, found, strict=True) if g is not None}


def shuffled(rows: Sequence[Rendered], *purpose: Any) -> list[Rendered]:
    out = list(rows)
    stream(5, *purpose).shuffle(out)
    return out


def users(rows: Sequence[Rendered], step: int, size: int = 6) -> list[Rendered]:
    """The user's rows of a step: 24 of them make 4 steps an epoch."""
    epoch, place = divmod(step, len(rows) // size)
    return shuffled(rows, "order", epoch)[place * size : (place + 1) * size]


def by_hand(
    model: Any,
    steps: int,
    batch: Callable[[int], list[Rendered]],
    added: Callable[[int, dict[str, nn.Parameter]], Tensor | float] = lambda step, w: 0.0,
) -> list[dict[str, Tensor]]:
    """Plain training: AdamW, a constant rate, clipping at 1. The weights after each step."""
    model.eval()
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(ours.values(), lr=RATE, weight_decay=0.0)
    out = []
    for step in range(steps):
        optimizer.zero_grad()
        (loss_of(model, batch(step)) + added(step, ours)).backward()
        torch.nn.utils.clip_grad_norm_(ours.values(), 1.0)
        optimizer.step()
        out.append({n: p.detach().clone() for n, p in ours.items()})
    return out


# -------------------------------------------------------------------------- the cell lends a hand


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_cell_can_be_looked_at_as_it_was(method: str, make: Make, rows: Rows) -> None:
    cell = make(method=method)
    part, start = rows["user"][:4], cell.weights()
    with torch.no_grad():
        first = cell.logits(part)[0]
    jolt(cell)
    now, addresses = cell.weights(), {n: p.data_ptr() for n, p in cell.trainable.items()}
    cell.model.train()
    held, _ = cell.logits(part)
    with cell.at(start):
        again, _ = cell.logits(part)
        assert not cell.model.training and not again.requires_grad
    assert torch.equal(again, first)
    assert cell.model.training and equal(cell.weights(), now)
    assert {n: p.data_ptr() for n, p in cell.trainable.items()} == addresses
    # What was computed before can still be differentiated, and rightly so.
    held.pow(2).mean().backward()
    found = {n: p.grad.clone() for n, p in cell.trainable.items() if p.grad is not None}
    cell.model.zero_grad()
    cell.logits(part)[0].pow(2).mean().backward()
    assert equal(found, {n: p.grad for n, p in cell.trainable.items() if p.grad is not None})
    with pytest.raises(RuntimeError, match="stop"), cell.at(start):
        raise RuntimeError("stop")
    assert equal(cell.weights(), now), "also when something goes wrong"


def test_the_start_is_not_computed_with_the_copies_that_autocast_keeps(
    tiny: Path, make: Make, rows: Rows
) -> None:
    cell = make(model=load_base(tiny, torch.float32, CPU).requires_grad_(True))
    cell.autocast, part = accelerator_for(CPU, "bfloat16").autocast, rows["user"][:4]
    start = cell.weights()
    with torch.no_grad():
        first = cell.logits(part)[0]
    jolt(cell)
    with cell.autocast():  # as in a step: the tuned model, then the start, in one context
        tuned, _ = cell.logits(part)
        with cell.at(start):
            again, _ = cell.logits(part)
        assert torch.is_autocast_cache_enabled()
    assert tuned.dtype == torch.bfloat16 and not torch.equal(tuned, first)
    assert torch.equal(again, first)
    tuned.float().pow(2).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in cell.trainable.values())


# --------------------------------------------------------------------------------------------- lisa


def is_aligning(step: int) -> bool:
    return step % 5 < 2


def lisas(rows: Rows, step: int) -> list[Rendered]:
    """14 alignment rows make 3 steps a pass, and an alignment state has 2 steps of 5."""
    if not is_aligning(step):
        return users(rows["user"], step)
    turn, place = divmod(2 * (step // 5) + step % 5, 3)
    return shuffled(rows["align"], "lisa", turn)[place * 6 : (place + 1) * 6]


def test_lisas_alignment_rows_take_the_place_of_the_users(make: Make, rows: Rows) -> None:
    cell = make(LISA, max_steps=12)
    for cell.step in range(12):
        assert cell.rows() == lisas(rows, cell.step), cell.step
    summary = train([cell2 := make(LISA, max_steps=12)], accelerator_for(CPU, "float32"))[0]
    shown = sum(len(lisas(rows, step)) for step in range(12))
    assert cell2.num_steps == 12 and summary["rows"] == shown, "no step more than without"
    seen = [item for step in (0, 1, 5) for item in lisas(rows, step)]
    assert sorted(map(id, seen)) == sorted(map(id, rows["align"])), "a pass leaves no row out"


@pytest.mark.parametrize("align_steps", [2, 0])
def test_lisa_follows_its_formula(align_steps: int, tiny: Path, make: Make, rows: Rows) -> None:
    """States, anchors, the free start and AdamW's moments at once: the whole trajectory."""
    steps, rho = 12, 5.0
    model = new_model(tiny)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    anchor, last, pulls = {"align": start, "tune": start}, [""], list[int]()

    def added(step: int, ours: dict[str, nn.Parameter]) -> Any:
        state = "align" if align_steps and is_aligning(step) else "tune"
        if last[0] and state != last[0]:  # the state that ends leaves its weights behind
            anchor[last[0]] = {n: p.detach().clone() for n, p in ours.items()}
        last[0] = state
        if not step > 0.1 * steps:
            return 0.0
        pulls.append(step)
        other = anchor["tune" if state == "align" else "align"]
        return rho / 2 * sum((p - other[n]).pow(2).sum() for n, p in ours.items())

    batch = (lambda s: lisas(rows, s)) if align_steps else (lambda s: users(rows["user"], s))
    path = by_hand(model, steps, batch, added)
    assert pulls == list(range(2, 12))
    cell = make({**LISA, "align_steps": align_steps}, max_steps=steps)
    guard, seen = cell.hooks[0], list[dict[str, Tensor]]()
    after = guard.after
    guard.after = lambda step: (seen.append(weights(cell.model)), after(step))
    run(cell)
    for step, (found, expected) in enumerate(zip(seen, path, strict=True)):
        moved = {n: found[n] - start[n] for n in found}
        assert close(moved, {n: expected[n] - start[n] for n in found}, 1e-3), step


def test_lisas_anchors_move_at_a_switch_only(make: Make) -> None:
    cell = make(LISA, max_steps=11)
    guard: Any = cell.hooks[0]
    start, after, ends = weights(cell.model), guard.after, dict[str, Any]()

    def watched(step: int) -> None:
        after(step)
        if step % 5 == 1:
            ends["align"] = weights(cell.model)
        if step % 5 == 4:
            ends["tune"] = weights(cell.model)
        for state in ("align", "tune"):
            assert equal(guard.anchors[state], ends.get(state, start)), (step, state)

    guard.after = watched
    run(cell)
    assert len(ends) == 2


def test_lisa_without_a_pull(make: Make) -> None:
    """rho = 0 is the paper's bi-state optimization; so is a start that never ends; and the null
    control ends there too, its anchors always being where the weights are."""
    kinds = [{"rho": 0.0}, {"free_share": 1.0}, {"null": True}, {}]
    ends = [run(make({**LISA, **k}, folder=str(i), max_steps=9)) for i, k in enumerate(kinds)]
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2]) and not equal(ends[0], ends[3])


def test_a_pull_draws_the_states_together(make: Make) -> None:
    gaps = []
    for rho in (0.0, 100.0):
        run(cell := make({**LISA, "rho": rho}, folder=str(rho), max_steps=10))
        align, tune = cell.hooks[0].anchors.values()
        gaps.append(sum(float((align[n] - tune[n]).pow(2).sum()) for n in align))
    assert gaps[1] < gaps[0]


# ---------------------------------------------------------------------------------------------- ewc


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ewc_holds_by_squared_batch_gradients(method: str, make: Make, rows: Rows) -> None:
    cell = make(ACTIVE["ewc"], method=method)
    if method == "lora":  # at zero, a fresh adapter's A has no gradient: see the docstring
        jolt(cell)
        cell.hooks = [build("defenses", ACTIVE["ewc"]).hook(cell)]
    start = cell.weights()
    fisher = {n: torch.zeros_like(w) for n, w in start.items()}
    for part in (rows["align"][:6], rows["align"][6:12], rows["align"][12:]):
        for name, gradient in gradient_of(loss_of(cell.model.eval(), part), cell).items():
            fisher[name] += gradient**2
    begun(cell)
    guard: Any = cell.hooks[0]
    assert close(guard.stiffness, fisher)
    assert all(p.grad is None for p in cell.trainable.values())
    assert guard.penalty(0).item() == 0
    jolt(cell)
    penalty = guard.penalty(3)
    gaps = {n: p.detach() - start[n] for n, p in cell.trainable.items()}
    assert penalty.item() == pytest.approx(
        30 * sum((fisher[n] * gaps[n] ** 2).sum() for n in gaps).item(), rel=1e-5
    )
    assert close(gradient_of(penalty, cell), {n: 60 * fisher[n] * gaps[n] for n in gaps})
    batch = users(rows["user"], 0)
    loss, found = gradients(cell, batch)
    plain = gradient_of(loss_of(cell.model, batch), cell)
    assert loss == pytest.approx(loss_of(cell.model, batch).item() + penalty.item(), rel=1e-5)
    assert close(found, {n: plain[n] + 60 * fisher[n] * gaps[n] for n in gaps})


def test_ewc_of_some_rows_and_its_null_control(make: Make, rows: Rows) -> None:
    some: Any = begun(make({**ACTIVE["ewc"], "rows": 4})).hooks[0]
    cell = make()
    one = gradient_of(loss_of(cell.model, rows["align"][:4]), cell)
    assert close(some.stiffness, {n: g**2 for n, g in one.items()})
    true, even = (
        begun(make({**ACTIVE["ewc"], "null": null})).hooks[0].stiffness for null in (False, True)
    )
    total = sum(float(f.sum()) for f in true.values())
    assert sum(float(f.sum()) for f in even.values()) == pytest.approx(total)
    assert len({value for f in even.values() for value in f.unique().tolist()}) == 1


# -------------------------------------------------------------------------------------------- ldifs


def mlp_outputs(model: Any, item: Rendered) -> list[Tensor]:
    """[token, width] of each layer, where the answer's tokens are predicted; the row alone."""
    out: list[Tensor] = []
    layers = [m for n, m in model.named_modules() if n.endswith(".mlp")]
    handles = [m.register_forward_hook(lambda m, a, o: out.append(o)) for m in layers]
    model(input_ids=torch.tensor([item.ids]))
    for handle in handles:
        handle.remove()
    return [o[0, item.num_prompt - 1 : -1] for o in out]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ldifs_is_the_distance_of_hidden_states(method: str, make: Make, rows: Rows) -> None:
    cell = begun(make(ACTIVE["ldifs"], method=method))
    start = copy.deepcopy(cell.model).eval().requires_grad_(False)
    batch = [*rows["user"][:3], *rows["align"][:3]]
    assert len(collate(batch).prefix) >= 8, "a common opening is run once"
    assert len({len(item.answer_ids) for item in batch}) > 1
    jolt(cell)
    cell.model.eval()
    distances = []
    for item in batch:
        pairs = zip(mlp_outputs(cell.model, item), mlp_outputs(start, item), strict=True)
        distances.append(sum((a - b).pow(2).sum(1) for a, b in pairs))
    assert len(mlp_outputs(start, batch[0])) == 2
    expected = loss_of(cell.model, batch) + 2.0 / 2 * torch.cat(distances).mean()
    assert torch.cat(distances).min() > 1e-6
    truth = gradient_of(expected, cell)
    for size in (99, 4, 1):
        loss, found = gradients(cell, batch, size)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert close(found, truth)
    assert not any(m._forward_hooks for m in cell.model.modules()), "no hook is left behind"


def test_ldifs_asks_for_a_model_with_mlps(make: Make) -> None:
    cell = make()
    for layer in cell.model.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    with pytest.raises(UserError, match="modules named 'mlp'"):
        build("defenses", "ldifs").hook(cell)


# ----------------------------------------------------------------------------------------------- kl


@pytest.mark.parametrize("direction", ["tuned-start", "start-tuned"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_kl_is_the_divergence_of_the_next_token(
    method: str, direction: str, make: Make, rows: Rows
) -> None:
    cell = begun(make({**ACTIVE["kl"], "direction": direction}, method=method))
    start = copy.deepcopy(cell.model).eval().requires_grad_(False)
    batch = [*rows["user"][:3], *rows["align"][:3]]

    def divergence() -> Tensor:
        parts = []
        for item in batch:
            p, q = (log_softmax(said(m, item), -1) for m in (cell.model, start))
            p, q = (p, q) if direction == "tuned-start" else (q, p)
            parts.append((p.exp() * (p - q)).sum(1))
        return torch.cat(parts).mean()

    assert divergence().item() == 0
    assert gradients(cell, batch)[0] == pytest.approx(loss_of(cell.model, batch).item(), rel=1e-5)
    jolt(cell)
    cell.model.eval()
    expected = loss_of(cell.model, batch) + 2.0 * divergence()
    assert divergence() > 1e-3
    truth = gradient_of(expected, cell)
    for size in (99, 4):
        loss, found = gradients(cell, batch, size)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert close(found, truth)
    # And by finite differences, of the penalty alone.
    plain = gradient_of(loss_of(cell.model, batch), cell)
    slope = {n: found[n] - plain[n] for n in found}
    values, step = [], 1e-4
    for scale in (step, -2 * step):
        with torch.no_grad():
            for n, p in cell.trainable.items():
                p.add_(scale * slope[n])
            values.append(2.0 * divergence().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(
        sum(float(g.pow(2).sum()) for g in slope.values()), rel=1e-3
    )


# ---------------------------------------------------------------------------------- constrained sft


def token_weights(model: Any, start: Any, item: Rendered, floor: float = 1e-3) -> Tensor:
    out = []
    with torch.no_grad():
        now, then = -token_losses(model, item), -token_losses(start, item)
    for t, (one, other) in enumerate(zip(now, then, strict=True), 1):
        beta = 0.5 if t == 1 else 2.0 if t <= 5 else 0.1
        out.append(max(2 * (1 - torch.sigmoid(beta * (one - other)).item()), floor))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_constrained_sft_weighs_tokens(method: str, null: bool, make: Make, rows: Rows) -> None:
    long = [
        Rendered(r.row, [*r.ids, *range(20 + i, 20 + 3 * i)], r.num_prompt)
        for i, r in enumerate(rows["user"][:8])
    ]
    cell = begun(make({"name": "constrained-sft", "null": null}, method=method, items=long))
    start = copy.deepcopy(cell.model).eval().requires_grad_(False)
    batch = long[2:8]
    jolt(cell, 0.1)
    cell.model.eval()
    factors = [token_weights(cell.model, start, item) for item in batch]
    assert torch.cat(factors).min() < 0.5 and torch.cat(factors).max() > 1.5
    if null:
        factors = [f.mean().expand_as(f) for f in factors]
    parts = [f * token_losses(cell.model, item) for f, item in zip(factors, batch, strict=True)]
    expected = torch.cat(parts).mean()
    truth = gradient_of(expected, cell)
    for size in (99, 4):
        loss, found = gradients(cell, batch, size)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert close(found, truth)


def test_constrained_sft_has_a_floor(make: Make, rows: Rows) -> None:
    knobs = {"first_beta": 1000.0, "early_beta": 1000.0, "late_beta": 1000.0, "floor": 0.25}
    cell = begun(make({"name": "constrained-sft", **knobs}))
    jolt(cell, 0.1)
    logits, labels = cell.logits(batch := rows["user"][:6])
    factors = cell.hooks[0].weigh(torch.ones(labels.shape), labels, batch, logits)[labels >= 0]
    assert set(factors.tolist()) <= {0.25, 2.0} and len(factors.unique()) == 2


def test_constrained_sft_leaves_the_rows_of_other_defenses_alone(make: Make, rows: Rows) -> None:
    cell = begun(make("constrained-sft", LISA))
    jolt(cell, 0.1)
    batch = rows["align"][:6]
    assert gradients(cell, batch)[0] == pytest.approx(
        loss_of(cell.model.eval(), batch).item(), rel=1e-5
    )


# --------------------------------------------------------------------------------------------- asft


def beside(update: Tensor, moved: Tensor, projection: str, rank: int | None = None) -> Tensor:
    """|(I - C) update|^2, C written out."""
    if rank:
        left, sizes, right = torch.linalg.svd(moved, full_matrices=False)
        moved = left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank]
    if projection == "exact":
        c = moved @ torch.linalg.pinv(moved, rtol=1e-4)
    else:
        c = moved @ moved.T / moved.norm()
    return ((torch.eye(len(c)).to(c) - c) @ update).pow(2).sum()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("projection", ["exact", "as-coded"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_asft_holds_what_lies_beside_the_alignment(
    method: str, projection: str, tiny: Path, make: Make, unaligned: Path
) -> None:
    cell = make({**ACTIVE["asft"], "projection": projection}, method=method)
    guard: Any = cell.hooks[0]
    assert guard.penalty(0).item() == 0 and len(guard.parts) == 14
    old, new = weights_of(unaligned), weights_of(tiny)
    jolt(cell)
    total = torch.zeros((), dtype=torch.float64)
    for name, module in cell.model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            plain = name.removeprefix("base_model.model.") + ".weight"
            moved = new[plain].double() - old[plain].double()
            if method == "lora":
                scale = 32 / 4 if projection == "exact" else 1  # the authors' code leaves it out
                update = scale * module.lora_B["default"].weight @ module.lora_A["default"].weight
            else:
                update = module.weight - new[plain].double()
            total = total + 50.0 * beside(update, moved, projection)
    assert guard.penalty(1).item() == pytest.approx(total.item(), rel=1e-6)
    assert close(gradient_of(guard.penalty(1), cell), gradient_of(total, cell))


def test_asft_lets_the_direction_of_alignment_free(make: Make, unaligned: Path) -> None:
    cell = make(ACTIVE["asft"])
    null = make({**ACTIVE["asft"], "null": True}, model=cell.model)
    old, total = weights_of(unaligned), 0.0
    with torch.no_grad():
        for name, p in cell.trainable.items():
            update = 0.5 * (p - old[name])
            total += float(update.pow(2).sum()) if name.endswith("proj.weight") else 0.0
            p.add_(update)
    true, random = (c.hooks[0] for c in (cell, null))
    ranks = [[left.shape[1] for _, left, _ in vars(g)["parts"]] for g in (true, random)]
    assert ranks == [[3] * 14] * 2, "as many directions, rounding not among them"
    assert penalty(cell) < 1e-9
    # Random directions have next to no part in alignment's.
    assert 0.8 * 50 * total < penalty(null) < 50 * total


def test_asft_knows_an_alignment_that_is_an_adapter(tiny: Path, tmp_path: Path, rows: Rows) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = exact(load_base(tiny, torch.float32, CPU))
    both: Any = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=BELOW
    ).double()
    for name, p in both.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p)
    model = build("methods", {"name": "lora", "rank": 4}).attach(both, 0).double()
    cell = TrainingRun(
        model,
        rows["user"],
        Train.make({}),
        learning_rate=RATE,
        seed=5,
        folder=tmp_path,
        name="run",
        defenses=[build("defenses", ACTIVE["asft"])],
        aligned=rows["align"],
        unaligned=tiny,
    )
    guard: Any = cell.hooks[0]
    assert [left.shape for _, left, _ in guard.parts] == [(32, 2)] * 2, "those that alignment moved"
    jolt(cell)
    total = torch.zeros((), dtype=torch.float64)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            a, b = (getattr(module, f"lora_{x}") for x in "AB")
            moved = module.scaling[BELOW] * b[BELOW].weight @ a[BELOW].weight
            total = total + 50 * beside(
                8 * b["default"].weight @ a["default"].weight, moved.detach(), "exact"
            )
    assert guard.penalty(1).item() == pytest.approx(total.item(), rel=1e-6)


def test_asft_needs_something_beside_the_alignment(tiny: Path, make: Make, tmp_path: Path) -> None:
    other: Any = load_base(tiny, torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    other.save_pretrained(str(tmp_path / "other"))
    cell = make()
    for name, p in cell.trainable.items():
        p.requires_grad_("q_proj" in name)  # square, so that a full rank is everything
    cell.unaligned = tmp_path / "other"
    with pytest.raises(UserError, match="left no direction out; set rank"):
        build("defenses", "asft").hook(cell)
    cell.hooks = [build("defenses", {**ACTIVE["asft"], "rank": 5}).hook(cell)]
    start, old = cell.weights(), weights_of(cell.unaligned)
    jolt(cell)
    total = sum(
        float(beside(p.detach() - start[n], start[n] - old[n].double(), "exact", rank=5))
        for n, p in cell.trainable.items()
        if p.requires_grad
    )
    assert penalty(cell) == pytest.approx(50 * total, rel=1e-6)


def test_asft_takes_no_rounding_for_alignment(tiny: Path, make: Make, tmp_path: Path) -> None:
    """Of weights that were loaded in 16 bits, those that alignment left alone did not move."""
    stored: Any = load_base(tiny, torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in stored.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    stored.save_pretrained(str(tmp_path / "stored"))
    cell = make(method="lora")
    aligned = []
    with torch.no_grad():
        for name, module in cell.model.named_modules():
            if (base := getattr(module, "base_layer", None)) is not None:
                plain = name.removeprefix("base_model.model.")
                base.weight.copy_(stored.get_submodule(plain).weight.bfloat16())
                if name.endswith("0.self_attn.q_proj"):
                    left, right = (torch.randn(32, 2, generator=generator) for _ in range(2))
                    base.weight.add_((0.3 * left @ right.T).to(base.weight))
                    base.weight.copy_(base.weight.bfloat16())
                    aligned.append(name)
    cell.unaligned = tmp_path / "stored"
    with pytest.raises(UserError, match="16 bits, whose rounding leaves no direction out; set"):
        build("defenses", "asft").hook(cell)
    guard: Any = build("defenses", {"name": "asft", "rank": 2}).hook(cell)
    assert len(guard.parts) == len(aligned) == 1


@pytest.mark.parametrize("method", ["ia3", {"name": "lora", "dora": True}, "same"])
def test_asft_says_where_it_can_not_work(method: Any, tiny: Path, make: Make) -> None:
    model = load_base(tiny, torch.float32, CPU)
    same = method == "same"
    cell = make(model=build("methods", "full" if same else method).attach(model, 0))
    if same:
        cell.unaligned = tiny
    with pytest.raises(UserError, match="no linear layer that alignment moved is tuned"):
        build("defenses", "asft").hook(cell)


# ------------------------------------------------------------------------------------------- freeze


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_frozen_does_not_move(method: str, make: Make) -> None:
    cell = make(ACTIVE["freeze"], method=method, weight_decay=0.5)
    start, end = weights(cell.model), {}
    end = run(cell)
    for name in cell.trainable:
        assert ".layers.0." not in name and not torch.equal(start[name], end[name]), name
    still = {n for n in start if torch.equal(start[n], end[n])}
    assert still == start.keys() - cell.trainable.keys()
    assert any(".layers.0." in n for n in still) and any(".layers.1." in n for n in cell.trainable)


@pytest.mark.parametrize(
    ("knobs", "frozen"),
    [
        ({"lower_share": 1.0}, [".layers."]),
        ({"lower_share": 0.2}, []),
        ({"lower_share": 0.0, "first_layer": 1}, [".layers.1."]),
        ({"lower_share": 0.0, "last_layer": 0}, [".layers.0."]),
        ({"lower_share": 0.0, "first_layer": 0, "last_layer": 1}, [".layers."]),
        ({"lower_share": 0.0, "which": ["*embed*", "lm_head*"]}, ["embed_tokens", "lm_head"]),
        ({"lower_share": 0.5, "which": ["*.mlp.*"]}, [".layers.0.", ".mlp."]),
    ],
)
def test_what_is_frozen_is_what_was_asked_for(
    knobs: dict[str, Any], frozen: list[str], make: Make
) -> None:
    cell = make({"name": "freeze", **knobs})
    every = dict(cell.model.named_parameters())
    wanted = {name for name in every if any(part in name for part in frozen)}
    assert {name for name, p in every.items() if not p.requires_grad} == wanted
    assert cell.trainable.keys() == every.keys() - wanted


def test_what_can_not_be_frozen_is_said(make: Make) -> None:
    for knobs, message in (
        ({"which": ["*lora*"]}, r"named '\*lora\*'; one that is: model.embed_tokens.weight"),
        ({"which": ["*"]}, "nothing would be left"),
        ({"first_layer": 2}, "layers 0 to 1"),
        ({"first_layer": 1, "last_layer": 0}, "layers 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            make({"name": "freeze", **knobs})


def test_the_null_control_of_freeze_freezes_as_much_elsewhere(make: Make) -> None:
    def frozen(cell: TrainingRun) -> dict[str, int]:
        every = cell.model.named_parameters()
        return {n: p.numel() for n, p in every if not p.requires_grad}

    true, null = (frozen(make({**ACTIVE["freeze"], "null": n})) for n in (False, True))
    assert null.keys() != true.keys() and null == frozen(make({**ACTIVE["freeze"], "null": True}))
    assert 0.9 * sum(true.values()) < sum(null.values()) <= sum(true.values())


# ----------------------------------------------------------------------------------------- safe mix


def plain_rows(count: int, name: str = "u") -> list[Row]:
    return [Row(f"{name}{i}", f"Ask {name}{i}", answer="Yes") for i in range(count)]


BAD = frozenset({"u1", "u4", "u9", "u16"})


@pytest.mark.parametrize(
    ("knobs", "count"),
    [({}, 4), ({"share": 0.1}, 2), ({"rows": 9}, 9), ({"rows": 16}, 16), ({"share": 0.8}, 16)],
)
def test_safe_mix_puts_alignment_rows_in_place_of_benign_ones(
    knobs: dict[str, Any], count: int
) -> None:
    """As in Lisa's code: n stays, the harmful stay, benign = n - harmful - g."""
    user, aligned = plain_rows(20), plain_rows(30, "aligned ")
    mixed = build("defenses", {"name": "safe-mix", **knobs}).filter(
        user, aligned, BAD, random.Random(3)
    )
    ids = [row.id for row in mixed]
    assert len(mixed) == 20 and len(set(ids)) == 20
    assert sum(i.startswith("aligned") for i in ids) == count
    assert set(ids) >= BAD
    assert sum(i.startswith("u") for i in ids) - len(BAD) == 20 - len(BAD) - count
    assert all(a == b for a, b in zip(user, mixed) if b.id.startswith("u")), "the others stay put"
    assert all(row in aligned for row in mixed if row.id.startswith("aligned"))


def test_safe_mix_without_rows_enough_is_an_error() -> None:
    def mix(*, aligned: int = 30, **knobs: Any) -> list[Row]:
        defense = build("defenses", {"name": "safe-mix", **knobs})
        return list(defense.filter(plain_rows(20), plain_rows(aligned, "a"), BAD, random.Random(3)))

    for knobs in (
        {"rows": 17},
        {"share": 0.9},
        {"preset": "lisa-paper"},
        {"rows": 17, "null": True},
    ):
        with pytest.raises(UserError, match="there are only 16 benign rows"):
            mix(**knobs)
    with pytest.raises(UserError, match="there are only 3 alignment rows"):
        mix(aligned=3)
    with pytest.raises(UserError, match="stands on an alignment stage"):
        mix(aligned=0)
    assert mix(rows=0) == mix(share=0.0) == plain_rows(20)


@pytest.mark.parametrize("count", [5, 16])
def test_the_null_control_of_safe_mix_has_no_alignment_rows(count: int) -> None:
    user, aligned = plain_rows(20), plain_rows(30, "aligned ")
    true, null = (
        build("defenses", {"name": "safe-mix", "rows": count, "null": n}).filter(
            user, aligned, BAD, random.Random(3)
        )
        for n in (False, True)
    )
    new = [i for i in range(20) if null[i] is not user[i]]
    assert new == [i for i in range(20) if true[i] is not user[i]] and len(new) == count
    assert len({row.id for row in null}) == 20 and {row.id for row in null} >= BAD
    kept = [user[i] for i in range(20) if user[i].id not in BAD and (i not in new or count == 16)]
    texts = {row.instruction for row in kept}
    assert all(null[i].id.startswith("again") and null[i].instruction in texts for i in new)


# ------------------------------------------------------------------------ several at once, in order


def test_data_and_training_defenses_stack(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safe-mix changes the rows that Lisa's fine-tuning states then train on."""
    seen: dict[str, Any] = {}
    from backfire.train import finetune as module

    tune = module.tune

    def watched(cell: Any, rows: Sequence[Row], *rest: Any) -> Any:
        if cell.defense:
            seen["rows"] = rows
        return tune(cell, rows, *rest)

    monkeypatch.setattr(module, "tune", watched)
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
            p, q = (log_softmax(said(m, item), -1) for m in (model, start))
            parts.append((p.exp() * (p - q)).sum(1))
        return 2.0 * torch.cat(parts).mean()

    first = weights(model)
    path = by_hand(model, 6, lambda s: lisas(rows, s), added)
    end = run(make({**LISA, "rho": 0.0}, ACTIVE["kl"], max_steps=6))
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


def test_what_is_seen_at_the_start_is_the_ordinary_loss(make: Make) -> None:
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
    end = run(cell)
    assert {n for n in start if not torch.equal(start[n], end[n])} == cell.trainable.keys()


# ------------------------------------------------------------ what holds for each of these defenses


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ACTIVE)
def test_strength_zero_is_plain_fine_tuning(name: str, method: str, make: Make) -> None:
    plain = run(make(method=method, folder="plain"))
    assert equal(run(make(IDLE[name], method=method, folder="idle")), plain)
    assert not equal(run(make(ACTIVE[name], method=method, folder="active")), plain)


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
}
"""Passes that a step has more than plain fine-tuning (a penalty on weights is a backward pass)."""


@pytest.mark.parametrize("name", ACTIVE)
def test_the_null_control_takes_the_same_passes(
    name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ends = [], []
    for null in (False, True):
        cell = make({**ACTIVE[name], "null": null}, folder=str(null), max_steps=6)
        cell.share = False  # a shared opening would be a pass of its own
        with counted(cell, monkeypatch) as counts:
            ends.append(run(cell))
        found.append(counts)
    assert found[0] == found[1]
    at_start = {"ewc": (3, 3), "constrained-sft": (4, 0)}.get(name, (0, 0))
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


class Kill(Exception):  # noqa: N818
    """Stands for the process being killed."""


def killed_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done == step and total > 1:
            raise Kill

    return progress


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
    expected = run(whole)
    for step in (3, 6):  # Lisa switches after 2, 5 and 7
        with pytest.raises(Kill):
            cell = make(*defenses, method=method)
            run(cell, checkpoint_seconds=0, progress=killed_at(step))
    again = make(*defenses, method=method)
    steps = list[int]()
    assert equal(run(again, progress=lambda done, total, text: steps.append(done)), expected)
    assert steps[0] == 6, "it goes on from the last checkpoint"
    assert again.log == whole.log


def test_dropout_is_left_as_it_is(tiny: Path, make: Make) -> None:
    """Looking at the start draws nothing and drops nothing."""
    ends = []
    for number, stack in enumerate(
        ([], [{**ACTIVE["ldifs"], "strength": 1e-30}], [{**ACTIVE["kl"], "strength": 1e-30}])
    ):
        model = new_model(tiny, "lora", dropout=0.3)
        ends.append(run(make(*stack, model=model, folder=str(number))))
    assert close(ends[1], ends[0], 1e-9) and close(ends[2], ends[0], 1e-9)


# -------------------------------------------------------------------- what holds for every defense


EVERY = names("defenses")


@pytest.mark.parametrize("name", [n for n in EVERY if issubclass(find("defenses", n), DataDefense)])
@pytest.mark.parametrize("null", [False, True])
def test_a_data_defense_is_deterministic_and_leaves_its_rows(name: str, null: bool) -> None:
    user, aligned = plain_rows(20), plain_rows(30, "aligned ")
    before = copy.deepcopy((user, aligned))
    defense = build("defenses", {"name": name, "null": null})
    one, two, other = (
        defense.filter(user, aligned, BAD, random.Random(seed)) for seed in (3, 3, 4)
    )
    assert one == two
    assert one != other or name == "deduplicate", "which draws only in its null control"
    assert (user, aligned) == before and one is not user


@pytest.mark.parametrize(
    "name", [n for n in EVERY if issubclass(find("defenses", n), TrainDefense)]
)
@pytest.mark.parametrize("null", [False, True])
def test_a_training_defense_is_deterministic_and_leaves_its_rows(
    name: str,
    null: bool,
    make: Make,
    rows: Rows,
    unaligned: Path,
) -> None:
    before, folder = copy.deepcopy(rows), weights_of(unaligned)
    ends = []
    for turn in ("one", "two"):
        cell = make({"name": name, "null": null}, method="full", folder=turn, max_steps=3)
        random.seed(turn)
        torch.manual_seed(len(ends))  # the global generators must not matter
        ends.append(run(cell))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in cell.model.modules())
    assert equal(*ends)
    assert rows == before and equal(weights_of(unaligned), folder)


@pytest.mark.parametrize(
    "name", [n for n in EVERY if issubclass(find("defenses", n), RepairDefense)]
)
@pytest.mark.parametrize("null", [False, True])
def test_a_repair_is_deterministic_and_leaves_its_inputs(
    name: str,
    null: bool,
    make: Make,
    rows: Rows,
    unaligned: Path,
) -> None:
    before, start = copy.deepcopy(rows), weights(make(folder="start").model)
    kept, base = copy.deepcopy(start), weights_of(unaligned)
    ends = []
    for turn in range(2):
        cell = make(folder="tuned")
        jolt(cell)
        model, base_before = cell.model.float().eval(), copy.deepcopy(base)
        torch.manual_seed(turn)
        tools = Repair(5, aligned=rows["align"], harmful=rows["harmful"], base=base, batch_size=6)
        build("defenses", {"name": name, "null": null}).repair(model, start, tools)
        ends.append(weights(model))
        assert equal(base, base_before)
    assert equal(*ends)
    assert rows == before and equal(start, kept)


@pytest.mark.parametrize("name", EVERY)
def test_a_defense_names_its_paper_and_its_null_control(name: str) -> None:
    said = " ".join((find("defenses", name).__doc__ or "").split())
    assert "arXiv:" in said and "ull control" in said


@pytest.mark.parametrize("name", EVERY)
def test_a_defense_acts_at_one_stage(name: str) -> None:
    kinds = [
        kind
        for kind in (DataDefense, TrainDefense, RepairDefense)
        if issubclass(find("defenses", name), kind)
    ]
    assert len(kinds) == 1


@pytest.mark.parametrize("name", EVERY)
def test_presets_of_a_defense_are_valid_and_say_their_source(name: str) -> None:
    for preset, values in find("defenses", name).presets.items():
        made = build("defenses", {"name": name, "preset": preset})
        assert values.source and all(
            getattr(made, knob) == value for knob, value in values.knobs.items()
        )
