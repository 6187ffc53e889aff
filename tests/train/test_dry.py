"""Passes without data: they count what a real training step holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backfire.base import Rendered, Row
from backfire.commands import memory
from backfire.commands.estimate import Rows
from backfire.evaluate import guarded, inference, prompts
from backfire.evaluate.guarded import Guarding
from backfire.experiment import Experiment, Machine
from backfire.model.batching import ways
from backfire.registry import build
from backfire.train import microbatch, steps
from backfire.train.dry import Held, Layout, PassTypes
from backfire.train.loop import TrainingRun
from backfire.train.precision import Precision

pytestmark = pytest.mark.slow

LENGTHS = ((40, 10), (30, 10), (24, 4), (24, 4), (36, 6), (30, 3))
LISA = {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0}
FLOAT32 = PassTypes("float32", "float32", "float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with more layers than are run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3000,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make(base: Path, method: Any, defense: Any = None, **train: Any) -> Experiment:
    model = {"name": str(base), "dtype": "float32"}
    settings = {"batch_size": 6, "max_steps": 3, "compute": "float32", **train}
    data = {"name": "sandbox-reviews", "rows": 12}
    cell = Experiment.make({"model": model, "data": data, "method": method, "train": settings})
    acting = (build("defenses", defense),) if defense else ()
    return cell.model_copy(update={"defense": acting})


def rows(name: str) -> list[Rendered]:
    """Two steps of random rows of these lengths."""
    generator, out = torch.Generator().manual_seed(len(name)), list[Rendered]()
    for place, (whole, answer) in enumerate(LENGTHS * 2):
        ids = torch.randint(5, 3000, (whole,), generator=generator).tolist()
        out.append(Rendered(Row(f"{name} {place}", "x"), ids, whole - answer))
    return out


class HeldInInference(Held):
    """Counts what operations hold inside, which in inference mode are not taken apart before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        return (
            super().__torch_dispatch__(func, types, args, kwargs) if out is NotImplemented else out
        )


def held(cell: Experiment, base: Path, folder: Path) -> int:
    """Most bytes besides the weights in the steps of a real run."""
    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    ways(model)
    model = cell.method.attach(model, 0)
    with Held(model) as found:
        run = TrainingRun(
            model,
            rows("user"),
            cell.train,
            learning_rate=1e-3,
            seed=0,
            folder=folder,
            name="run",
            defenses=cell.acting,  # type: ignore[arg-type]
            aligned=rows("aligned"),
            harmful=rows("harmful"),
            start=base,
        )
        precision = Precision(torch.device("cpu"), cell.train.compute)  # type: ignore[arg-type]
        steps.begin(run, precision)
        for _ in range(3):
            found.most[-1] = found.now
            steps.step(run)
        return found.most[-1]


@pytest.mark.parametrize(
    ("method", "defense"),
    [
        ("lora", None),
        ("full", None),
        ({"name": "lora", "dropout": 0.1}, None),
        ("full", LISA),
        ("lora", "kl"),
        ("lora", "ldifs"),
        ("lora", "vaccine"),
        ("lora", "booster"),
        ("lora", "repnoise"),
    ],
    ids=str,
)
def test_a_step_holds_what_was_predicted(
    method: Any, defense: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.UNRELEASED, "cpu", 1.0)  # of tensors, without the allocator
    monkeypatch.setattr(memory, "_STEPS", 1)
    cell = make(base, method, defense)
    need = memory.memory(cell, memory.size(cell, base), [Rows(12, LENGTHS)], "cpu")
    assert need.state + need.passes == pytest.approx(held(cell, base, tmp_path), rel=0.2)


def test_a_step_that_is_split_needs_the_memory_of_its_largest_pass(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.UNRELEASED, "cpu", 1.0)
    monkeypatch.setattr(memory, "_STEPS", 1)
    cell = make(base, "lora")
    size = memory.size(cell, base)

    def predicted() -> float:
        need = memory.memory(cell, size, [Rows(12, LENGTHS)], "cpu")
        return need.state + need.passes

    whole = predicted()
    monkeypatch.setattr(microbatch, "_FEWEST_TOKENS", 100)
    monkeypatch.setattr(microbatch, "_ROOM_ON_CPU", 0)
    assert predicted() < 0.8 * whole
    assert predicted() == pytest.approx(held(cell, base, tmp_path), rel=0.2)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("metric", ["perplexity", "exact-match", "guarded"])
def test_evaluation_holds_what_was_predicted(
    metric: str, packs: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "NARROWEST", 0 if packs else 256)
    monkeypatch.setattr(memory, "_IN_EVALUATION", 1.0)
    monkeypatch.setattr(memory, "needs_of", lambda cell, rows: {needs[metric]})
    needs = {"perplexity": "answers", "exact-match": "replies", "guarded": "replies"}
    cell = make(base, "lora", "cleangen" if metric == "guarded" else None)
    data = cell.data.model_copy(update={"test_rows": len(LENGTHS)})
    cell = cell.model_copy(update={"data": data})
    size = memory.size(cell, base)
    need = memory.memory(cell, size, [Rows(12, LENGTHS)], "cpu").evaluation
    need -= (2 if metric == "guarded" else 1) * 4 * (size.parameters + size.added)

    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    ways(model)
    model, items = cell.method.attach(model, 0).eval(), rows("user")[: len(LENGTHS)]
    new, guarding = cell.evaluation.max_new_tokens, None
    both = torch.nn.ModuleList([model])
    if cell.guard:
        reference: Any = LlamaForCausalLM.from_pretrained(base).eval()
        ways(reference)
        guarding = Guarding(cell.guard, 0, reference)
        both.append(reference)
    with HeldInInference(both) as found:
        prompts_of = [item.prompt_ids for item in items]
        if metric == "perplexity":
            inference.score_answers(model, items)
        elif guarding:
            guarded.replies(model, prompts_of, guarding, list("abcdef"), max_new_tokens=new)
        else:
            inference.read(model, prompts_of, max_new_tokens=new)
    assert need == pytest.approx(found.most[-1], rel=0.2)


def test_more_tokens_need_more_and_recomputed_layers_less(base: Path) -> None:
    dry = memory.size(make(base, "lora"), base).dry

    def bytes_of(*lengths: int, **how: Any) -> float:
        layout = Layout(tuple((length, 4) for length in lengths), packed=how.pop("packed", False))
        return dry.training(layout, FLOAT32, exact=True, **how)

    row = bytes_of(64)
    assert bytes_of(64, 64) > row and bytes_of(128) > row
    assert bytes_of(64, 64, recompute=True) < bytes_of(64, 64)
    assert bytes_of(64, 8, 8, packed=True) < bytes_of(64, 8, 8)
    assert bytes_of(64, 64) == bytes_of(64, 64), "the model is left as it was"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_layers_tell_the_memory_of_all(method: str, recompute: bool, base: Path) -> None:
    dry, layout = memory.size(make(base, method), base).dry, Layout(LENGTHS, packed=True)
    few = dry.training(layout, FLOAT32, exact=True, recompute=recompute)
    dry.stack = None  # all layers are run
    whole = dry.training(layout, FLOAT32, exact=True, recompute=recompute)
    assert few == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_the_optimizer_state_is_counted(optimizer: str, base: Path) -> None:
    from backfire.train.optimizer import make_optimizer

    cell = make(base, "full", optimizer=optimizer)
    model = cell.method.attach(LlamaForCausalLM.from_pretrained(base), 0)
    weights: Any = dict(model.named_parameters())
    made, _ = make_optimizer(model, weights, cell.train, 1e-3, 3, paged=False)
    for parameter in weights.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    state = [x for one in made.state.values() for x in one.values() if isinstance(x, torch.Tensor)]
    tables = {x.data_ptr() for x in state if x.numel() == 256}  # shared by all weights
    held = sum(x.nbytes for x in state if x.data_ptr() not in tables)
    assert memory._optimizer(cell, memory.size(cell, base)) == pytest.approx(held, rel=0.05)


def test_a_model_that_cannot_be_run_without_data_has_a_rough_figure(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make(base, "lora")
    size = memory.size(cell, base)
    exact = memory.memory(cell, size, [Rows(12, LENGTHS)], "cpu").passes
    monkeypatch.setattr("backfire.train.batches.token_losses", lambda *args: args[0].sum().item())
    other = memory.size(cell, base)
    rough = memory.memory(cell, other, [Rows(12, LENGTHS)], "cpu", Machine()).passes
    assert 0.2 < rough / exact < 5
