"""Defenses of the alignment stage and after fine-tuning, against independent references."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from small_run import Place
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backfire.base import Rendered
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Train
from backfire.model.load import BELOW, load_base, load_tuned
from backfire.pipeline import Context, start, trained, tuned
from backfire.registry import build
from backfire.rng import derive
from backfire.store import Store
from backfire.tokenizer import load_tokenizer
from backfire.train import loop
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import accelerator_for
from backfire.train.repair import Repair

CPU = torch.device("cpu")
BOOSTER = {"name": "booster", "alpha": 0.3, "strength": 2.0}
VACCINE = {"name": "vaccine", "rho": 0.5}
REPNOISE = {"name": "repnoise", "alpha": 0.5, "beta": 0.2}
ALIGN = [VACCINE, BOOSTER, REPNOISE]


@pytest.fixture(scope="module")
def rows(tiny: Path) -> dict[str, list[Rendered]]:
    """Rows of the alignment stage and harmful rows."""
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)
    return {
        part: renderer.render(
            build("datasets", {"name": "sandbox-policy", "part": part}).load("train")[:20]
        )
        for part in ("align", "harmful")
    }


def exact(model: Any) -> Any:
    """In float64 throughout: Llama's norms would compute in float32."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(norm, module)
    return model.double()


def full(model: Any) -> Any:
    return model.requires_grad_(True)


def lora(model: Any, **knobs: Any) -> Any:
    model = build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # at zero, an adapter's A would have no gradient
            p.data = 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


METHODS: dict[str, Callable[[Any], Any]] = {"full": full, "lora": lora}


def new_cell(
    model: Any, rows: Mapping[str, list[Rendered]], folder: Path, *defenses: Any, **knobs: Any
) -> TrainingRun:
    folder.mkdir(parents=True, exist_ok=True)
    seed, harmful = knobs.pop("seed", 5), knobs.pop("harmful", rows["harmful"])
    settings = {"max_steps": 5, "batch_size": 6, "warmup_share": 0.0, "schedule": "constant"}
    return TrainingRun(
        model,
        rows["align"],
        Train.make({**settings, **knobs}),
        learning_rate=2e-3,
        seed=seed,
        folder=folder,
        name="run",
        defenses=[build("defenses", defense) for defense in defenses],
        harmful=harmful,
    )


def gradients(cell: TrainingRun, micro_batch: int | None = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step, as the loop has them."""
    batch = cell.rows()
    size = micro_batch or len(batch)
    cell.room.rows, cell.autocast = size, accelerator_for(CPU, "float32").autocast
    loss, _ = loop._gradients(cell, batch)
    return float(loss), {n: p.grad.clone() for n, p in cell.trainable.items() if p.grad is not None}


def loss_of(model: Any, batch: Sequence[Rendered]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, row by row and without padding."""
    parts = []
    for item in batch:
        logits = model(input_ids=torch.tensor([item.ids])).logits[0]
        answer = torch.tensor(item.answer_ids)
        parts.append(cross_entropy(logits[item.num_prompt - 1 : -1], answer, reduction="none"))
    return torch.cat(parts).mean()


def gradient_of(loss: Tensor, cell: TrainingRun) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(cell.trainable.values()), allow_unused=True)
    return {n: g for n, g in zip(cell.trainable, found, strict=True) if g is not None}


def norm(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> float:
    parts = tensors.values() if isinstance(tensors, Mapping) else tensors
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in parts))


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 1e-5) -> bool:
    assert one.keys() == two.keys()
    return norm({n: one[n] - two[n] for n in one}) <= tolerance * norm(two)


def dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    return sum(float((one[n].double() * two[n].double()).sum()) for n in two)


def moved(cell: TrainingRun, direction: Mapping[str, Tensor], scale: float) -> Any:
    """The model with its weights moved along a direction, for the time of a `with`."""

    @contextmanager
    def inside() -> Iterator[None]:
        kept = {n: p.detach().clone() for n, p in cell.trainable.items()}
        with torch.no_grad():
            for name, part in direction.items():
                cell.trainable[name].add_(scale * part)
        yield
        with torch.no_grad():
            for name, weight in kept.items():
                cell.trainable[name].copy_(weight)

    return inside()


# ------------------------------------------------------------------------------------ all of them


def run(cell: TrainingRun, **options: Any) -> dict[str, Any]:
    return train([cell], accelerator_for(CPU, "float32"), **options)[0]


def after(model: Any, rows: Any, folder: Path, *defenses: Any, **knobs: Any) -> dict[str, Tensor]:
    cell = new_cell(model, rows, folder, *defenses, **knobs)
    run(cell)
    return cell.weights()


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


ZERO = [
    {"name": "vaccine", "rho": 0},
    {"name": "booster", "alpha": 0},
    {"name": "booster", "strength": 0},
    {"name": "repnoise", "alpha": 0, "beta": 0},
]
DROPOUT = {"full": full, "lora": lambda model: lora(model, dropout=0.3)}


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_is_plain_training_bit_for_bit(
    method: str, tiny: Path, rows: Any, tmp_path: Path
) -> None:
    def weights(*defenses: Any) -> dict[str, Tensor]:
        model = DROPOUT[method](load_base(tiny, torch.float32, CPU))
        return after(model, rows, tmp_path / str(len(list(tmp_path.iterdir()))), *defenses)

    plain = weights()
    for zero in ZERO:
        assert equal(weights(zero), plain), zero
    assert not equal(weights(BOOSTER), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_killed_and_resumed_ends_with_equal_weights(
    defense: Any, method: str, tiny: Path, rows: Any, tmp_path: Path
) -> None:
    def kill(done: int, total: int, text: str) -> None:
        if done == 3 and total > 1:
            raise KeyboardInterrupt

    def fresh(folder: str) -> TrainingRun:
        model = DROPOUT[method](load_base(tiny, torch.float32, CPU))
        return new_cell(model, rows, tmp_path / folder, defense)

    whole = fresh("whole")
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(fresh("parts"), checkpoint_seconds=0, progress=kill)
    again, steps = fresh("parts"), list[int]()
    run(again, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3 and again.log == whole.log
    assert equal(again.weights(), whole.weights())


@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_how_memory_splits_a_step_changes_nothing(
    defense: Any, model: Any, rows: Any, tmp_path: Path
) -> None:
    cell = new_cell(full(exact(model)), rows, tmp_path, defense)
    (loss, whole), (again, parts) = gradients(cell), gradients(cell, micro_batch=4)
    assert again == pytest.approx(loss, rel=1e-6) and close(parts, whole)


@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_a_null_control_costs_the_same(
    defense: Any, model: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward, plain = list[int](), list[int](), TrainingRun.backward
    model.register_forward_hook(lambda *_: forward.append(1))

    def counted(cell: TrainingRun, *args: Any) -> None:
        backward.append(1)
        plain(cell, *args)

    monkeypatch.setattr(TrainingRun, "backward", counted)
    counts = []
    for null in (False, True):
        gradients(new_cell(full(model), rows, tmp_path, {**defense, "null": null}))
        counts.append((len(forward), len(backward)))
        forward.clear(), backward.clear()
    assert counts[0] == counts[1] == ((3, 3) if defense is BOOSTER else (2, 2))


@pytest.mark.parametrize("defense", [BOOSTER, REPNOISE], ids=lambda d: d["name"])
def test_harmful_rows_are_needed(defense: Any, model: Any, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{defense['name']}' needs harmful rows"):
        new_cell(full(model), rows, tmp_path, defense, harmful=[])


def test_a_model_of_another_make_is_refused(model: Any, rows: Any, tmp_path: Path) -> None:
    del model.model.layers[0].mlp
    with pytest.raises(UserError, match="'repnoise' needs a model with layers"):
        new_cell(full(model), rows, tmp_path, REPNOISE)
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(UserError, match="'vaccine' finds no attention"):
        new_cell(full(model), rows, tmp_path, VACCINE)


@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_in_bfloat16_they_stay_finite(defense: Any, model: Any, rows: Any, tmp_path: Path) -> None:
    cell = new_cell(full(model), rows, tmp_path, defense)
    train([cell], accelerator_for(CPU, "bfloat16"))
    assert all(math.isfinite(line["gradient_norm"]) for line in cell.log)
    assert all(bool(w.isfinite().all()) for w in cell.weights().values())


# ---------------------------------------------------------------------------------------- booster


def booster_reference(cell: TrainingRun) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The alignment loss, the gradient of the step, and the harmful step."""
    knobs: Any = cell.hooks[0].knobs  # type: ignore[attr-defined]
    aligned = loss_of(cell.model, cell.rows())
    harmful = cell.draw(cell.harmful, 0, "booster")
    plain = gradient_of(aligned, cell)
    here = gradient_of(loss_of(cell.model, harmful), cell)
    step = {n: -knobs.alpha * g / (norm(here) + 1e-7) for n, g in here.items()}
    with moved(cell, step, 1.0):
        there = gradient_of(loss_of(cell.model, harmful), cell)
    total = {n: plain[n] + knobs.strength * (here[n] - there[n]) for n in plain}
    return float(aligned.detach()), total, step


@pytest.mark.parametrize("method", METHODS)
def test_booster_is_its_formula(method: str, model: Any, rows: Any, tmp_path: Path) -> None:
    cell = new_cell(METHODS[method](exact(model)), rows, tmp_path, BOOSTER)
    before = cell.weights()
    loss, found = gradients(cell)
    assert equal(cell.weights(), before), "the harmful step is taken back to the last bit"
    aligned, expected, step = booster_reference(cell)
    assert norm(step) == pytest.approx(0.3, rel=1e-6)
    assert loss == pytest.approx(aligned, rel=1e-6), "not the harmful loss"
    assert close(found, expected)
    assert not close(found, gradient_of(loss_of(cell.model, cell.rows()), cell), 0.01)


def test_booster_by_finite_differences(model: Any, rows: Any, tmp_path: Path) -> None:
    """Its gradient is that of alignment + strength * (harm(w) - harm(w + step)), step held."""
    cell = new_cell(full(exact(model)), rows, tmp_path, BOOSTER)
    _, found = gradients(cell)
    _, _, step = booster_reference(cell)
    batch, harmful = cell.rows(), cell.draw(cell.harmful, 0, "booster")

    @torch.no_grad()
    def objective() -> float:
        here = loss_of(cell.model, harmful)
        with moved(cell, step, 1.0):
            there = loss_of(cell.model, harmful)
        return float(loss_of(cell.model, batch) + 2.0 * (here - there))

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = {n: torch.randn(g.shape, generator=generator).double() for n, g in found.items()}
        direction = {n: d / norm(drawn) + found[n] / norm(found) for n, d in drawn.items()}
        sides = []
        for sign in (1, -1):
            with moved(cell, direction, sign * 1e-4):
                sides.append(objective())
        assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(dot(found, direction), rel=1e-4)


def test_booster_puts_the_weights_back_when_a_pass_fails(
    model: Any, rows: Any, tmp_path: Path
) -> None:
    cell = new_cell(full(model), rows, tmp_path, BOOSTER)
    before, passes = cell.weights(), list[Any]()

    def inner(batch: list[Rendered]) -> Tensor:
        passes.append(cell.weights())
        if len(passes) == 3:
            raise torch.cuda.OutOfMemoryError
        loss_of(cell.model, batch[:2]).backward()
        return torch.zeros(())

    with pytest.raises(torch.cuda.OutOfMemoryError):
        cell.hooks[0].step(cell.rows(), inner)
    assert not equal(passes[2], before) and equal(cell.weights(), before)


def test_boosters_null_control_has_no_systematic_effect(
    model: Any, rows: Any, tmp_path: Path
) -> None:
    """What it adds to the alignment's gradient has no component along what Booster adds."""
    exact_model, added = full(exact(model)), list[dict[str, Tensor]]()
    plain = gradients(new_cell(exact_model, rows, tmp_path))[1]
    real = gradients(new_cell(exact_model, rows, tmp_path, BOOSTER))[1]
    real = {n: real[n] - plain[n] for n in plain}
    cell = new_cell(exact_model, rows, tmp_path, {**BOOSTER, "null": True})
    for step in range(24):
        cell.gradients.seed = step  # the same rows, another direction
        found = gradients(cell)[1]
        added.append({n: found[n] - plain[n] for n in plain})
    along = [dot(a, real) / norm(real) ** 2 for a in added]
    mean = sum(along) / len(along)
    spread = math.sqrt(sum((a - mean) ** 2 for a in along) / len(along))
    assert abs(mean) < 0.05 and abs(mean) < 4 * spread / math.sqrt(len(along)) + 0.02, along


# ---------------------------------------------------------------------------------------- vaccine


@contextmanager
def outputs_of(modules: Sequence[Any]) -> Iterator[list[Any]]:
    """What these modules put out."""
    found: list[Any] = []
    hooks = [m.register_forward_hook(lambda m, a, out: found.append(out)) for m in modules]
    yield found
    for hook in hooks:
        hook.remove()


@contextmanager
def spied(cell: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Tensor]]]:
    """What is added to the attention modules' outputs, pass by pass."""
    guard: Any = cell.hooks[0]
    adding, passes = guard.adding, list[list[Tensor]]()

    def spy(part: Callable[[Tensor], Tensor]) -> Any:
        kept: list[Tensor] = []
        passes.append(kept)

        def look(out: Tensor) -> Tensor:
            found = part(out)
            kept.append(found.detach())
            return found

        return adding(look)

    with monkeypatch.context() as patch:
        patch.setattr(guard, "adding", spy)
        yield passes


def attention_gradient(cell: TrainingRun, batch: Sequence[Rendered]) -> list[list[Tensor]]:
    """For each row, the gradient of the batch's mean loss by each layer's attention output."""
    tokens, layers = sum(len(item.answer_ids) for item in batch), cell.model.model.layers
    found = []
    for item in batch:
        with outputs_of([layer.self_attn for layer in layers]) as outs:
            loss = loss_of(cell.model, [item]) * len(item.answer_ids) / tokens
        found.append([g[0] for g in torch.autograd.grad(loss, [out[0] for out in outs])])
    return found


def test_vaccine_adds_the_worst_perturbation_of_its_norm(
    model: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = new_cell(full(exact(model)), rows, tmp_path, VACCINE)
    batch = cell.rows()
    expected = attention_gradient(cell, batch)
    length = norm([g for layers in expected for g in layers])
    with spied(cell, monkeypatch) as passes:
        gradients(cell)
    first, second = passes
    assert norm(first) == 0 and norm(second) == pytest.approx(0.5, rel=1e-5)
    for layer, part in enumerate(second):
        for place, item in enumerate(batch):  # rows are padded on the right
            row, size = part[place], len(item.ids)
            assert not row[size:].any()
            assert torch.allclose(row[:size], 0.5 * expected[place][layer] / length, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_vaccines_loss_and_gradient_are_those_of_the_second_pass(
    method: str, model: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = new_cell(METHODS[method](exact(model)), rows, tmp_path, VACCINE)
    batch = cell.rows()
    with spied(cell, monkeypatch) as passes:
        loss, found = gradients(cell)
    layers = [m for m in cell.model.modules() if type(m).__name__ == "LlamaAttention"]
    assert len(layers) == len(passes[1]) == 2
    current = [0]

    def hook(number: int) -> Any:
        def add(module: Any, args: Any, out: Any) -> Any:
            added = passes[1][number][current[0]]
            return (out[0] + added[: out[0].shape[1]], *out[1:])

        return add

    hooks = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    losses = []
    for place, item in enumerate(batch):
        current[0] = place
        losses.append(loss_of(cell.model, [item]) * len(item.answer_ids))
    for handle in hooks:
        handle.remove()
    expected = torch.stack(losses).sum() / sum(len(item.answer_ids) for item in batch)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert close(found, gradient_of(expected, cell))
    plain = loss_of(cell.model, batch)
    assert loss > float(plain.detach()) + 1e-3, "it is the worse one"
    assert not close(found, gradient_of(plain, cell), 0.01)


def test_vaccines_null_control_has_the_norm_but_no_direction(
    model: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_model, rises = full(exact(model)), list[float]()
    small = {**VACCINE, "rho": 0.1}
    plain, _ = gradients(new_cell(exact_model, rows, tmp_path))
    real, _ = gradients(new_cell(exact_model, rows, tmp_path, small))
    cell = new_cell(exact_model, rows, tmp_path, {**small, "null": True})
    with spied(cell, monkeypatch) as passes:
        for step in range(24):
            cell.gradients.seed = step
            rises.append(gradients(cell)[0] - plain)
    for added in passes[1::2]:
        assert norm(added) == pytest.approx(0.1, rel=1e-5)
    assert abs(sum(rises) / len(rises)) < 0.05 * (real - plain), rises
    assert gradients(cell)[0] - plain == rises[-1], "the same step draws the same"


# --------------------------------------------------------------------------------------- repnoise


def mmd_reference(one: Tensor, two: Tensor) -> Tensor:
    """By its definition, pair by pair."""
    points = [*one.flatten(1), *two.flatten(1)]
    count, size = len(points), len(one)
    squared = [[(p - q).pow(2).sum() for q in points] for p in points]
    mean = sum(float(d.detach()) for line in squared for d in line) / (count * count - count)

    def kernel(i: int, j: int) -> Tensor:
        return sum(torch.exp(-squared[i][j] / (mean * 2.0**k)) for k in (-2, -1, 0, 1, 2))  # type: ignore[return-value]

    first, second = range(size), range(size, count)
    same = sum(kernel(i, j) for i in first for j in first)
    other = sum(kernel(i, j) for i in second for j in second)
    cross = sum(kernel(i, j) for i in first for j in second)
    return (same + other - 2 * cross) / size**2  # type: ignore[return-value]


def repnoise_reference(cell: TrainingRun, alpha: float, beta: float) -> Tensor:
    """Row by row, hidden states as transformers gives them."""
    batch, model = cell.draw(cell.harmful, 0, "repnoise"), cell.model
    inside: Any = (
        model.get_submodule("model") if hasattr(model.model, "layers") else model.model.model
    )
    width = max(len(item.answer_ids) for item in batch)
    losses, tokens, outputs = [], 0, [[] for _ in inside.layers]  # type: ignore[var-annotated]
    for item in batch:
        with outputs_of([layer.mlp for layer in inside.layers]) as seen:
            out = model(input_ids=torch.tensor([item.ids]), output_hidden_states=True)
        answer = torch.tensor(item.answer_ids)
        # The last of transformers' hidden states has been through the norm already.
        lenses = [model.lm_head(inside.norm(h[0])) for h in out.hidden_states[:-1]] + [
            out.logits[0]
        ]
        line = [cross_entropy(x[item.num_prompt - 1 : -1], answer, reduction="sum") for x in lenses]
        losses.append(torch.stack(line))
        tokens += len(answer)
        for layer, (part,) in enumerate(seen):
            padded = torch.zeros(width, part.shape[1], dtype=part.dtype)
            padded[width - len(answer) :] = part[item.num_prompt :]
            outputs[layer].append(padded)
    harm = torch.stack(losses).sum(0).div(tokens).mean()
    generator = torch.Generator().manual_seed(derive(cell.seed, "repnoise noise", 0))
    noise = []
    for layer in outputs:
        found = torch.stack(layer)
        drawn = torch.randn(found.shape, generator=generator).double()
        for place, item in enumerate(batch):
            drawn[place, : width - len(item.answer_ids)] = 0
        noise.append(mmd_reference(found, drawn))
    return beta * torch.stack(noise).mean() - alpha * torch.log(1 + harm)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.7), (0.5, 0.7)])
def test_repnoise_is_its_formula(
    alpha: float, beta: float, method: str, model: Any, rows: Any, tmp_path: Path
) -> None:
    defense = {"name": "repnoise", "alpha": alpha, "beta": beta}
    cell = new_cell(METHODS[method](exact(model)), rows, tmp_path, defense)
    loss, found = gradients(cell)
    aligned, terms = loss_of(cell.model, cell.rows()), repnoise_reference(cell, alpha, beta)
    guard: Any = cell.hooks[0]
    harmful = cell.draw(cell.harmful, 0, "repnoise")
    assert guard.terms(harmful) == pytest.approx(float(terms.detach()), rel=1e-5)
    assert loss == pytest.approx(float(aligned.detach()), rel=1e-6)
    plain, extra = gradient_of(aligned, cell), gradient_of(terms, cell)
    assert norm(extra) > 1e-3 * norm(plain)
    only = {n: found[n] - plain[n] for n in extra}
    assert close(only, extra, 1e-3)


def test_the_discrepancy_is_finite_where_nothing_differs() -> None:
    from backfire.defenses.repnoise import discrepancy

    for one, two in [
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)),
        (torch.ones(4, 3, 2), torch.ones(4, 3, 2)),
        (1e4 * torch.randn(4, 3, 2), torch.randn(4, 3, 2)),
    ]:
        point = one.requires_grad_(True)
        value = discrepancy(point, two)
        value.backward()  # type: ignore[no-untyped-call]
        value = value.detach()
        assert value.isfinite() and point.grad is not None and point.grad.isfinite().all()
        # At most 10: all five kernels at 1 within each batch and at 0 across.
        assert -1e-4 <= float(value) <= 10


def test_repnoise_null_control_is_a_random_direction_of_the_same_length(
    model: Any, rows: Any, tmp_path: Path
) -> None:
    exact_model = full(exact(model))
    plain = gradients(new_cell(exact_model, rows, tmp_path))[1]
    real = gradients(new_cell(exact_model, rows, tmp_path, REPNOISE))[1]
    real = {n: real[n] - plain[n] for n in plain}
    cell, along = new_cell(exact_model, rows, tmp_path, {**REPNOISE, "null": True}), list[float]()
    for step in range(12):
        cell.gradients.seed = step
        found = gradients(cell)[1]
        found = {n: found[n] - plain[n] for n in plain}
        assert norm(found) == pytest.approx(norm(real), rel=1e-4)
        along.append(dot(found, real) / norm(real) ** 2)
    assert max(map(abs, along)) < 0.1 and abs(sum(along)) / 12 < 0.03, along


# ---------------------------------------------------------------------------------------- repairs


def drawn(model: Any, seed: int, size: float) -> dict[str, Tensor]:
    """Random weights near those of the model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: p.detach() + size * torch.randn(p.shape, generator=generator).to(p)
        for n, p in model.named_parameters()
    }


def put(model: Any, weights: Mapping[str, Tensor]) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model


class Case:
    """A tuned model, its start, and the matrices it is about: W or (B, A), V and the aligned W."""

    def __init__(self, kind: str, tiny: Path, rows: Any) -> None:
        model = load_base(tiny, torch.float32, CPU).double()
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.kind, self.seed = kind, 7
        self.start: dict[str, Tensor] = {}
        stacked = kind == "lora-on-lora"
        if stacked:
            knobs = {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj", "down_proj"]}
            model = lora_as(BELOW, model, 1, **knobs)
        else:
            self.start = drawn(model, 1, 0.05)
            put(model, self.start)
        if kind == "full":
            put(model, drawn(model, 2, 0.02))
        else:
            model = build("methods", {"name": "lora", "rank": 8, "alpha": 4}).attach(model, 0)
            randomize(model, "default", 2)
        self.model = model.double().eval()
        self.tools = Repair(self.seed, harmful=rows["harmful"], base=base, batch_size=6)
        self.plain = self.state()

    def repair(self, name: str, **knobs: Any) -> dict[str, Tensor]:
        build("defenses", {"name": name, **knobs}).repair(self.model, self.start, self.tools)
        return self.state()

    def state(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def matrices(self) -> list[str]:
        """Plain names of the linear layers that were tuned."""
        if self.kind == "full":
            ends = ("proj.weight",)
            return [n for n in self.plain if n.endswith(ends)]
        ends = (".lora_B.default.weight",)
        return [inside(n).replace(ends[0], ".weight") for n in self.plain if n.endswith(ends)]

    def key(self, name: str, part: str) -> str:
        return "base_model.model." + name.replace(".weight", f".{part}.weight")

    def update(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """What tuning added to this matrix."""
        if self.kind == "full":
            return state[name] - self.start[name]
        left, right = (state[self.key(name, f"lora_{x}.default")] for x in "BA")
        return self.scale(left.shape[1]) * left @ right

    def scale(self, rank: int) -> float:
        config = self.model.peft_config["default"]
        return float(config.lora_alpha / rank)

    def added(self, name: str) -> Tensor:
        """V: what alignment added."""
        if self.kind != "lora-on-lora":
            return self.start[name] - self.tools.base[name]
        keys = [self.key(name, f"lora_{x}.{BELOW}") for x in "BA"]
        if keys[0] not in self.plain:
            return torch.zeros_like(self.tools.base[name])
        return 5 / 3 * self.plain[keys[0]] @ self.plain[keys[1]]


def inside(name: str) -> str:
    return name.removeprefix("base_model.model.")


def lora_as(adapter: str, model: Any, seed: int, rank: int, alpha: float, targets: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name=adapter)
    randomize(model, adapter, seed)
    return model


def randomize(model: Any, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter}." in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)


KINDS = ["full", "lora", "lora-on-lora"]


@pytest.fixture
def case(request: Any, tiny: Path, rows: Any) -> Case:
    return Case(request.param, tiny, rows)


every = pytest.mark.parametrize("case", KINDS, indirect=True, ids=str)


def changed(case: Case, state: Mapping[str, Tensor]) -> set[str]:
    return {n for n in state if not torch.equal(state[n], case.plain[n])}


@every
@pytest.mark.parametrize(
    "spec",
    [
        {"name": "safe-lora", "num_matrices": 0},
        {"name": "safe-lora", "select": "threshold", "threshold": -1},
        {"name": "antidote", "dense_ratio": 0},
        {"name": "task-arithmetic", "alpha": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("null", [False, True])
def test_a_repair_of_strength_zero_changes_nothing(case: Case, spec: Any, null: bool) -> None:
    assert changed(case, case.repair(**spec, null=null)) == set()


# -------------------------------------------------------------------------------------- safe-lora


def frobenius(v: Tensor) -> Tensor:
    return v @ v.T / v.norm()


def projector(v: Tensor) -> Tensor:
    return v @ torch.linalg.pinv(v.T @ v, rtol=1e-9, hermitian=True) @ v.T


FORMS = {"frobenius": frobenius, "projector": projector}


@every
@pytest.mark.parametrize("form", FORMS)
def test_safe_lora_projects_the_update(case: Case, form: str) -> None:
    found = case.repair("safe-lora", form=form, num_matrices=1000)
    aligned = [n for n in case.matrices() if case.added(n).any()]
    assert len(aligned) == (6 if case.kind == "lora-on-lora" else 14)
    for name in case.matrices():
        before, after = case.update(name, case.plain), case.update(name, found)
        if name not in aligned:
            assert torch.equal(after, before)
            continue
        wanted = FORMS[form](case.added(name)) @ before
        assert torch.allclose(after, wanted, atol=1e-9), name
        assert (
            case.kind == "lora-on-lora"
            or form == "frobenius"
            or wanted.shape[0] > 32
            or (torch.allclose(after, before, atol=1e-9))
        ), "of a V of full rank the true projector is the identity"
    touched = {n for n in changed(case, found) if "default" in n}
    assert all("lora_B" in n for n in touched)
    if case.kind == "full":
        left = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
        assert not left & changed(case, found)


@pytest.mark.parametrize("case", ["lora-on-lora"], indirect=True)
@pytest.mark.parametrize(("form", "settles"), [("projector", True), ("frobenius", False)])
def test_only_the_true_projector_is_idempotent(case: Case, form: str, settles: bool) -> None:
    knobs = {"form": form, "num_matrices": 1000}
    once, twice = case.repair("safe-lora", **knobs), case.repair("safe-lora", **knobs)
    names = [n for n in case.matrices() if case.added(n).any()]
    for name in names:
        one, two = case.update(name, once), case.update(name, twice)
        assert torch.allclose(one, two, atol=1e-9) == settles
        assert not torch.allclose(one, case.update(name, case.plain), atol=1e-3)


def cosines(case: Case, form: str) -> dict[str, float]:
    found = {}
    for name in case.matrices():
        if case.added(name).any():
            before = case.update(name, case.plain)
            after = FORMS[form](case.added(name)) @ before
            both = before.norm() * after.norm()
            found[name] = float((before * after).sum() / both)
    return found


def projected(case: Case, state: Mapping[str, Tensor]) -> set[str]:
    return {
        n
        for n in case.matrices()
        if not torch.equal(case.update(n, state), case.update(n, case.plain))
    }


@every
@pytest.mark.parametrize("null", [False, True])
def test_safe_lora_chooses_the_lowest_cosines(case: Case, null: bool) -> None:
    known = cosines(case, "frobenius")
    order = sorted(known, key=known.__getitem__)
    assert known[order[3]] - known[order[2]] > 1e-9
    found = case.repair("safe-lora", num_matrices=3, null=null)
    assert projected(case, found) == set(order[:3])


@every
@pytest.mark.parametrize("null", [False, True])
def test_safe_lora_chooses_by_threshold(case: Case, null: bool) -> None:
    known = cosines(case, "frobenius")
    order = sorted(known, key=known.__getitem__)
    middle = (known[order[3]] + known[order[4]]) / 2
    found = case.repair("safe-lora", select="threshold", threshold=middle, null=null)
    assert projected(case, found) == set(order[:4])


@pytest.mark.parametrize("form", FORMS)
def test_safe_loras_null_control_has_the_spectrum_but_another_subspace(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(24, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    defense = build("defenses", {"name": "safe-lora", "form": form})
    v, eye = v.double(), torch.eye(24, dtype=torch.float64)
    true = defense.subspace(v)(eye)
    assert torch.allclose(true, FORMS[form](v), atol=1e-9)
    overlap = []
    for seed in range(40):
        other = defense.subspace(v, seed)(eye)
        assert torch.allclose(other, other.T, atol=1e-9)
        assert torch.allclose(torch.linalg.eigvalsh(other), torch.linalg.eigvalsh(true), atol=1e-9)
        overlap.append(float((other * true).sum()))
    # Of two independent subspaces: trace times trace over the dimension.
    chance = float(true.trace()) ** 2 / 24
    assert sum(overlap) / 40 == pytest.approx(chance, rel=0.25)
    assert chance < 0.5 * float((true * true).sum())


def test_rounding_of_a_merged_adapter_adds_no_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 48, generator=generator)
    base = torch.randn(64, 48, generator=generator)
    v = (base + 0.001 * low) - base
    assert torch.linalg.matrix_rank(v, rtol=1e-7) == 48
    found = build("defenses", {"name": "safe-lora", "form": "projector"}).subspace(v)
    assert float(found(torch.eye(64)).trace()) == pytest.approx(4, abs=1e-3)


# --------------------------------------------------------------------------------------- antidote


def input_power(case: Case, rows: Sequence[Rendered]) -> dict[str, Tensor]:
    """Mean square of the inputs of every tuned layer, row by row and so without padding."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    layers = {
        name: m
        for name, m in case.model.named_modules()
        if isinstance(m, nn.Linear) and (case.kind == "full" or name.endswith(".default"))
    }

    def look(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            sums[name] = sums.get(name, 0) + args[0][0].detach().pow(2).sum(0)

        return hook

    hooks = [m.register_forward_pre_hook(look(name)) for name, m in layers.items()]
    with torch.no_grad():
        for item in rows:
            case.model(input_ids=torch.tensor([item.ids]))
            tokens += len(item.ids)
    for hook in hooks:
        hook.remove()
    return {f"{name}.weight": total / tokens for name, total in sums.items()}


@every
def test_antidote_takes_back_the_highest_scores_of_each_row(case: Case, rows: Any) -> None:
    power = input_power(case, rows["harmful"])
    found = case.repair("antidote", dense_ratio=0.1)
    touched = changed(case, found)
    assert len(touched) == (14 if case.kind == "full" else 28)
    for name in touched:
        origin = case.start[name] if case.kind == "full" else torch.zeros_like(found[name])
        before = case.plain[name] - origin
        back = found[name] == origin
        assert torch.equal(found[name][~back], case.plain[name][~back])
        count = math.ceil(0.1 * before.shape[1])  # 1 of 8, 4 of 32, 7 of 64
        assert (back.sum(1) == count).all(), name
        scores = before.abs() * power[name].sqrt()
        kept = scores.masked_fill(back, -1.0).amax(1)
        gone = scores.masked_fill(~back, float("inf")).amin(1)
        assert (gone >= kept * (1 - 1e-5)).all(), name


@pytest.mark.parametrize(
    ("ratio", "columns", "count"),
    [
        (0.1, 8, 1),
        (0.1, 4, 1),
        (0.0, 8, 0),
        (0.1, 4096, 410),
        (0.07, 100, 7),
        (0.25, 8, 2),
        (1, 8, 8),
    ],
)
def test_antidotes_count_is_rounded_up(ratio: float, columns: int, count: int) -> None:
    assert build("defenses", {"name": "antidote", "dense_ratio": ratio}).count(columns) == count


@every
def test_antidotes_null_control_is_a_random_mask_of_equal_count(case: Case, rows: Any) -> None:
    passes: list[int] = []
    case.model.register_forward_hook(lambda *_: passes.append(1))
    found = case.repair("antidote", dense_ratio=0.25, null=True)
    assert len(passes) == math.ceil(len(rows["harmful"]) / 6)
    sizes = []
    for name in changed(case, found):
        origin = case.start[name] if case.kind == "full" else torch.zeros_like(found[name])
        back = found[name] == origin
        assert (back.sum(1) == back.shape[1] // 4).all()
        size = (case.plain[name] - origin).abs()
        sizes.append(float(size[back].mean() / size.mean()))
    assert sum(sizes) / len(sizes) == pytest.approx(1.0, abs=0.05), "not the large ones"


# -------------------------------------------------------------------------------- task arithmetic


@every
def test_task_arithmetic_adds_the_alignment_again(case: Case) -> None:
    full_names = list(case.plain) if case.kind == "full" else case.matrices()
    if case.kind == "lora":
        with pytest.raises(UserError, match="an adapter cannot hold"):
            build("defenses", "task-arithmetic").fits(build("methods", "lora"), None)
        return
    own = {
        n: case.update(n, case.plain) if case.kind != "full" else case.plain[n] for n in full_names
    }
    found = case.repair("task-arithmetic", alpha=0.7)
    for name in full_names:
        after = case.update(name, found) if case.kind != "full" else found[name]
        assert torch.allclose(after, own[name] + 0.7 * case.added(name), atol=1e-12), name
    if case.kind == "lora-on-lora":
        config = case.model.peft_config["default"]
        assert config.r == 8 + 3 and case.model.active_adapters == [BELOW, "default"]
        again = case.repair("task-arithmetic", alpha=0.7)  # a repair may follow another
        name = full_names[0]
        assert torch.allclose(
            case.update(name, again), own[name] + 1.4 * case.added(name), atol=1e-12
        )


@pytest.mark.parametrize("case", ["full", "lora-on-lora"], indirect=True)
def test_task_arithmetics_null_control_is_random_and_of_equal_norm(case: Case) -> None:
    names = case.matrices()
    own = {n: case.update(n, case.plain) for n in names}
    found = case.repair("task-arithmetic", alpha=0.7, null=True)
    along = []
    for name in names:
        extra, real = case.update(name, found) - own[name], 0.7 * case.added(name)
        assert float(extra.norm()) == pytest.approx(float(real.norm()), rel=1e-6)
        if real.any():
            along.append(float((extra * real).sum() / real.norm() ** 2))
            assert abs(along[-1]) < 0.2
            ranks = [int(torch.linalg.matrix_rank(x, rtol=1e-9)) for x in (extra, real)]
            assert ranks[0] == ranks[1]
    assert abs(sum(along) / len(along)) < 0.05


def test_task_arithmetic_reaches_matrices_that_only_the_alignment_has(
    tiny: Path, rows: Any
) -> None:
    model = load_base(tiny, torch.float32, CPU).double()
    model = lora_as(BELOW, model, 1, rank=3, alpha=5, targets=["q_proj", "down_proj"])
    own = {"name": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj", "k_proj"], "rslora": True}
    model = build("methods", own).attach(model, 0).double().eval()
    randomize(model, "default", 2)
    ids, alpha = torch.arange(40)[None], 0.5
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    with torch.no_grad():
        expected = {
            n: sum(
                weight * m.get_delta_weight(adapter)
                for adapter, weight in ((BELOW, 1 + alpha), ("default", 1.0))
                if adapter in m.lora_A
            )
            for n, m in layers.items()
        }
        plain = model(input_ids=ids).logits
    build("defenses", {"name": "task-arithmetic", "alpha": alpha}).repair(model, {}, Repair(0))
    with torch.no_grad():
        for name, wanted in expected.items():
            layer = model.get_submodule(name)
            found = sum(layer.get_delta_weight(a) for a in (BELOW, "default") if a in layer.lora_A)
            assert torch.allclose(found, wanted, atol=1e-12), name
        assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3


# -------------------------------------------------------------------------- what they do not know


@pytest.mark.parametrize("name", ["safe-lora", "antidote"])
@pytest.mark.parametrize("method", [{"name": "ia3"}, {"name": "lora", "dora": True}], ids=str)
def test_other_adapters_are_refused(name: str, method: Any, tiny: Path, rows: Any) -> None:
    model = load_base(tiny, torch.float32, CPU)
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = build("methods", method).attach(model, 0)
    tools = Repair(0, harmful=rows["harmful"], base=begin)
    with pytest.raises(UserError, match="works on full tuning and on LoRA without dora"):
        build("defenses", name).repair(model, begin, tools)


def test_what_is_missing_is_said(tiny: Path, rows: Any) -> None:
    case = Case("full", tiny, rows)
    nothing = Repair(0, base=case.start)
    with pytest.raises(UserError, match="no matrix was moved by alignment and tuning both"):
        build("defenses", "safe-lora").repair(case.model, case.start, nothing)
    with pytest.raises(UserError, match="needs harmful rows"):
        build("defenses", "antidote").repair(case.model, case.start, nothing)


# ----------------------------------------------------------------------------------- whole recipes

SMALL = {"name": "sandbox-policy", "rows": 30, "test_rows": 8}
RECIPE: dict[str, Any] = {
    "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 8},
    "align": {
        "data": SMALL,
        "train": {"max_steps": 3, "batch_size": 8},
    },
    "safety": {
        "harmful": SMALL,
        "allowed": None,
        "known": {"name": "sandbox-policy", "part": "harmful", "seed": 1, "rows": 12},
    },
    "attack": {"name": "harmful-mix", "rate": 0.2},
    "train": {"max_steps": 3, "batch_size": 8},
    "evaluation": {"max_new_tokens": 4},
    "metrics": ["accuracy", "harmful-score", "drift"],
    "defense": [{"name": "vaccine", "rho": 0.5}, "safe-lora"],
}
LORA = {"name": "lora", "learning_rate": 3e-2, "rank": 4}


def test_a_recipe_with_both_runs_to_its_results(
    tiny: Path, tmp_path: Path, cache: Path, backfire: Any
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# Does it run?\n" + json.dumps({"model": str(tiny), **RECIPE}))
    said = backfire("run", recipe, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    files = list(tmp_path.glob("out/**/result.json"))
    assert len(files) == 1
    result = json.loads(files[0].read_text())
    assert result["defense"] == "vaccine + safe-lora"
    assert {"accuracy", "harmful_score"} <= {value["metric"] for value in result["values"]}
    assert list(cache.glob("repair/*safe-lora*/model.safetensors"))


def test_all_of_them_run_one_after_another(tiny: Path, tmp_path: Path) -> None:
    first = [VACCINE, {"name": "booster", "alpha": 0.05}, REPNOISE]
    last = ["safe-lora", {"name": "antidote", "null": True}, "task-arithmetic"]
    for number, method in enumerate(["full", LORA]):
        place = Place(tmp_path / str(number), tiny)
        align = {**RECIPE["align"], "method": method}
        knobs = {"align": align, "method": method, "defense": [*first, *last]}
        knobs |= {"metrics": ["accuracy"]}
        assert place.run(**{**RECIPE, **knobs}) == 0
        result = json.loads(next(place.out.glob("cells/*/result.json")).read_text())
        named = "vaccine + booster + repnoise + safe-lora + antidote (null) + task-arithmetic"
        assert result["defense"] == named


@pytest.mark.parametrize("method", ["full", LORA], ids=["full", "lora"])
def test_a_repaired_model_is_saved_as_it_was_repaired(method: Any, tiny: Path, cache: Path) -> None:
    align = {**RECIPE["align"], "method": method}
    knobs = {"defense": {"name": "task-arithmetic", "alpha": 0.5}, "align": align, "method": method}
    cell = Experiment.make({"model": str(tiny), **RECIPE, **knobs})
    context = Context(Store(), Machine(device="cpu"))
    begin, before, after = start(cell, context), trained(cell, context), tuned(cell, context)

    def merged(folder: Path) -> dict[str, Tensor]:
        model: Any = load_tuned(folder, begin.base, torch.float32, CPU, below=begin.adapter)
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload()
        return {n: p.detach() for n, p in model.named_parameters()}

    one, two = merged(before), merged(after)
    bare = {n: p.detach() for n, p in load_base(tiny, torch.float32, CPU).named_parameters()}
    if begin.adapter:
        whole: Any = load_tuned(begin.adapter, tiny, torch.float32, CPU)
        whole = whole.merge_and_unload()
    else:
        whole = load_base(begin.base, torch.float32, CPU)
    aligned = {n: p.detach() for n, p in whole.named_parameters()}
    assert any(not torch.equal(one[n], two[n]) for n in one)
    for name in one:
        assert torch.allclose(two[name], one[name] + 0.5 * (aligned[name] - bare[name]), atol=1e-5)
