"""Training in 16-bit types, and optimizers with states in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.errors import CellError
from backfire.evaluate.inference import score_tokens
from backfire.experiment import Train
from backfire.model.load import load_base
from backfire.registry import build
from backfire.train import batches, checkpoint, loop, steps
from backfire.train.half import LossScale, _join, _split
from backfire.train.loop import TrainingRun, train
from backfire.train.optimizer import STATE_BYTES
from backfire.train.precision import Precision, disable_adapter_casts
from tests.helpers.training import CPU, Kill, close, equal, killed_at, norm

pytestmark = pytest.mark.slow

BF16 = {"name": "full", "dtype": "bfloat16"}
LORA = {"name": "lora", "rank": 4}
New = Callable[..., TrainingRun]


@pytest.fixture
def new(tiny: Path, items: list[Rendered], tmp_path: Path) -> New:
    """A training run of the tiny model by a method, in a folder of its own."""

    def make(
        method: Any, *defenses: Any, rate: float = 2e-3, folder: str = "run", **knobs: Any
    ) -> TrainingRun:
        made = build("methods", method)
        dtype = getattr(torch, knobs.pop("weights", "float32"))
        settings = {"max_steps": 6, "batch_size": 8, "warmup_share": 0.0, **knobs}
        (tmp_path / folder).mkdir(exist_ok=True)
        return TrainingRun(
            made.attach(load_base(tiny, dtype, CPU), 0),
            items,
            Train.make(settings),
            learning_rate=rate,
            seed=5,
            folder=tmp_path / folder,
            name="run",
            trained_type=made.trained_type(),
            defenses=[build("defenses", defense) for defense in defenses],
            aligned=items[:8],
        )

    return make


def run(cell: TrainingRun, compute: Any = "float32", **options: Any) -> dict[str, Any]:
    if compute != "float32":
        disable_adapter_casts(cell.model)
    return train([cell], Precision(CPU, compute), **options)[0]


def overflow(model: Any) -> None:
    """Make hidden states of the model exceed float16."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp" in name and "lora" not in name:
                p.fill_(100.0)


def update(cell: TrainingRun, start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(p - start[n]).flatten().detach() for n, p in cell.trainable.items()])


# --------------------------------------------------------------------------------- float32 masters


def test_updates_too_small_for_bfloat16_add_up(new: New) -> None:
    """At this rate an update is far below the spacing of bfloat16 numbers at most weights."""
    plain, half = new("full", rate=1e-6), new(BF16, rate=1e-6, folder="half")
    start = plain.weights()
    run(plain)
    summary = run(half)
    moved, expected = update(half, start), update(plain, start)
    cosine = float(torch.nn.functional.cosine_similarity(moved, expected, dim=0))
    assert cosine > 0.9 and norm([moved]) == pytest.approx(norm([expected]), rel=0.05)
    assert summary["drift"] == pytest.approx(norm([moved]), rel=1e-3)
    first = torch.cat([w.flatten() for w in start.values()])
    lost = (first + moved).bfloat16() == first.bfloat16()
    assert float(lost.float().mean()) > 0.8, "the weights of the passes show hardly any of it"


def test_the_passes_see_rounded_masters_and_the_masters_are_saved(new: New) -> None:
    cell = new(BF16, max_steps=3)
    seen: list[bool] = []

    def look(*_: Any) -> None:
        rounded = cell.weights()
        with cell.exact():
            exact = cell.weights()
        seen.append(
            all(w.dtype == torch.bfloat16 for w in rounded.values())
            and equal(rounded, {n: _split(w)[0] for n, w in exact.items()})
        )

    cell.model.register_forward_pre_hook(look)
    run(cell)
    assert len(seen) >= 3 and all(seen)
    assert {p.dtype for p in cell.model.parameters()} == {torch.float32}
    again = new(BF16, max_steps=3, folder="again")
    run(again)
    assert equal(cell.weights(), again.weights())


def test_a_weight_is_taken_apart_and_joined_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64)
    weights = bits.to(torch.int32).view(torch.float32)
    weights = weights[weights.abs() < 3e38]
    halfway = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    weights = torch.cat([weights, halfway, -halfway, torch.tensor([0.0, -0.0, 1e-45, 1.5])])
    upper, lower = _split(weights)
    assert torch.equal(_join(upper, lower).view(torch.int32), weights.view(torch.int32))
    nearest = (upper.float() - weights).abs() <= (weights.bfloat16().float() - weights).abs()
    assert bool(nearest.all()) and (upper.nbytes + lower.nbytes) == weights.nbytes


@pytest.mark.parametrize(
    "defense",
    [
        {"name": "lisa", "rho": 5.0, "align_steps": 1, "tune_steps": 1, "free_share": 0.0},
        {"name": "ewc", "strength": 30.0},
    ],
    ids=lambda defense: defense["name"],
)
def test_a_proximal_term_pulls_at_the_masters(defense: Any, new: New) -> None:
    """With rounded weights it would be zero until a weight moves to the next bfloat16 number."""
    pulled = {}
    for name, method in (("plain", "full"), ("half", BF16)):
        cell = new(method, defense, rate=1e-6, folder=name)
        steps.begin(cell, Precision(CPU, "float32"))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad(), cell.exact():
            for p in cell.trainable.values():
                p.add_(1e-6 * torch.randn(p.shape, generator=generator))
        hook: Any = cell.hooks[0]
        if defense["name"] == "ewc":  # the same in both, whatever its gradients' rounding
            hook.stiffness = {n: torch.ones_like(w) for n, w in hook.stiffness.items()}
        with cell.exact():
            cell.backward(hook.penalty(5))
        pulled[name] = {n: g.float() for n, g in cell.gradients.take().items()}
    assert close(pulled["half"], pulled["plain"], 1e-2)


def test_a_step_that_runs_out_of_memory_is_taken_once(
    new: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, short = new(BF16), new(BF16, folder="short")
    run(plain)
    step, calls = short.optimizer.step, [0]

    def failing() -> Any:
        calls[0] += 1
        if calls[0] in (4, 60):  # within the first step, and within a later one
            raise torch.OutOfMemoryError("no room for a gradient in float32")
        return step()

    failing._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as the schedule marks it
    monkeypatch.setattr(short.optimizer, "step", failing)
    run(short)
    assert calls[0] > 60 and equal(plain.weights(), short.weights())


# ----------------------------------------------------------------------- optimizers, resuming


def test_states_in_8_bits_take_a_quarter_of_the_memory(new: New) -> None:
    plain, small = new("full"), new("full", optimizer="paged-adamw-8bit", folder="small")
    start = plain.weights()
    run(plain)
    run(small)
    cosine = torch.nn.functional.cosine_similarity(
        update(plain, start), update(small, start), dim=0
    )
    assert float(cosine) > 0.95
    # A small matrix, and the embedding, keep 32 bits.
    large = {p for p in small.trainable.values() if p.numel() >= 4096}
    large -= {small.model.get_input_embeddings().weight}
    assert large
    for p, state in small.optimizer.state.items():
        moments = {"state1", "state2", "absmax1", "absmax2"} & state.keys()
        each = sum(state[name].nbytes for name in moments) / p.numel()
        assert each == pytest.approx(STATE_BYTES["adamw-8bit" if p in large else "adamw"], abs=0.01)


@pytest.mark.parametrize(
    ("method", "compute", "knobs"),
    [
        (BF16, "bfloat16", {}),
        (BF16, "float32", {"optimizer": "adamw-8bit"}),
        (LORA, "float16", {}),
    ],
    ids=["bfloat16", "8 bits", "float16"],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(
    method: Any, compute: str, knobs: Any, new: New
) -> None:
    whole = new(method, folder="whole", **knobs)
    run(whole, compute)
    with pytest.raises(Kill):
        run(new(method, **knobs), compute, checkpoint_seconds=0, progress=killed_at(3))
    resumed, steps = new(method, **knobs), list[int]()
    run(resumed, compute, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3 and equal(resumed.weights(), whole.weights())
    assert resumed.scaling.state() == whole.scaling.state()


def test_checkpoints_take_at_most_a_twentieth_of_the_time(
    new: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint.interval(60, 1) == 60 and checkpoint.interval(0, 90) == 0
    assert checkpoint.interval(60, 90) == pytest.approx(19 * 90)
    saved, now = list[int](), [0.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    def slow(cell: TrainingRun) -> None:
        saved.append(cell.step)
        now[0] += 0.2

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    run(new(LORA), checkpoint_seconds=1e-6)
    assert saved == [1]
    run(new(LORA, folder="every"), checkpoint_seconds=0, progress=lambda *_: None)
    assert saved == [1, *range(1, 7)]


# ----------------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_float16_gives_what_float32_gives(weights: str, new: New, every_step: None) -> None:
    plain, half = new(LORA), new(LORA, weights=weights, folder="half")
    run(plain)
    run(half, "float16")
    assert {p.dtype for p in half.trainable.values()} == {torch.float32}
    ours, theirs = ([line["loss"] for line in cell.log] for cell in (half, plain))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_small_gradients_survive_in_float16(new: New) -> None:
    """A loss a million times smaller has gradients that float16 cannot hold unscaled."""

    def gradient(scale: float) -> dict[str, Tensor]:
        cell = new("full", folder=str(scale))
        steps.begin(cell, Precision(CPU, "float16"))
        cell.scaling.value = scale
        rows = cell.rows()
        logits, labels = cell.logits(rows)
        cell.backward(1e-6 * batches.token_losses(logits, labels).sum())
        return cell.gradients.take()

    cell = new("full", folder="exact")
    logits, labels = cell.logits(cell.rows())
    cell.backward(1e-6 * batches.token_losses(logits, labels).sum())
    exact = cell.gradients.take()
    assert close(gradient(LossScale.LARGEST), exact, 2e-2)
    assert not close(gradient(1.0), exact, 0.1)


@pytest.mark.parametrize("defense", [None, "ldifs", "kl"])
def test_a_step_that_overflows_is_computed_again(defense: str | None, new: New) -> None:
    defenses = [defense] if defense else []
    plain, high = (new(LORA, *defenses, folder=name, max_steps=2) for name in ("plain", "high"))
    run(plain, "float16")
    high.scaling.value = 2.0**28
    summary = run(high, "float16")
    assert summary["repeated_steps"] > 2 and summary["steps"] == 2
    assert close(high.weights(), plain.weights(), 1e-3)
    assert [line["learning_rate"] for line in high.log] == [
        line["learning_rate"] for line in plain.log
    ]


def test_the_scale_rises_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "PATIENCE", 3)
    scaling = LossScale()
    norms = [1.0, math.inf, 1.0, 1.0, 1.0, math.nan, 1.0]
    assert [scaling.accepts(torch.tensor(norm)) for norm in norms] == [
        norm == 1.0 for norm in norms
    ]
    assert scaling.state() == [2.0**15, 1, 2]


def test_overflow_in_evaluation_is_an_error(tiny: Path, items: list[Rendered]) -> None:
    model, item = load_base(tiny, torch.float16, CPU), items[0]
    assert all(map(math.isfinite, score_tokens(model, item.prompt_ids, item.answer_ids)))
    overflow(model)
    with pytest.raises(CellError, match="Hidden states exceed float16's largest number"):
        score_tokens(model, item.prompt_ids, item.answer_ids)


def test_overflow_without_scaling_is_an_error(new: New) -> None:
    cell = new(LORA, weights="float16")
    overflow(cell.model)
    with pytest.raises(CellError, match="not finite in float16, whose largest number is 65,504"):
        run(cell, "float16")
