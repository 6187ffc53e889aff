"""Training at the size of real models: memory, learning rates, long rows, checkpoints elsewhere."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire import stages
from backfire.base import LARGE, Rendered, Row, TrainDefense, TrainHook
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine, Train
from backfire.launch.job import Folder, run_job
from backfire.launch.progress import Log
from backfire.model.count import num_weights, weights_in, weights_of_shape
from backfire.model.load import load_base
from backfire.plan import Job
from backfire.recipe import parse, read, shipped
from backfire.registry import build, find, names
from backfire.store import Store
from backfire.tokenizer import load_tokenizer
from backfire.train import drift, loop, microbatch
from backfire.train import finetune as running
from backfire.train.batches import answer_logits
from backfire.train.finetune import Start, tune
from backfire.train.loop import TrainingRun, train
from backfire.train.microbatch import Room
from backfire.train.precision import accelerator_for, without_casts

CPU = torch.device("cpu")
TRAINED = [name for name in names("methods") if find("methods", name).make({}).trains]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for what is held in circles takes half a second."""
    monkeypatch.setattr(microbatch.gc, "collect", lambda: 0)


def rows_of(count: int, source: Any = "sandbox-reviews") -> list[Row]:
    rows = build("datasets", source).load("train")[:count]
    # Answers and inputs of many lengths, behind one opening.
    return [
        Row(f"{source} {r.id}", "Please answer this.", r.prompt[-5 - 7 * (i % 9) :], r.answer)
        for i, r in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Renderer:
    return Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)


@pytest.fixture(scope="module")
def items(renderer: Renderer) -> list[Rendered]:
    return renderer.render(rows_of(16))


@pytest.fixture
def new(
    tiny: Path, items: list[Rendered], renderer: Renderer, tmp_path: Path
) -> Callable[..., TrainingRun]:
    harmful = renderer.render(rows_of(7, {"name": "sandbox-policy", "part": "harmful"}))
    aligned = renderer.render(rows_of(11, "sandbox-policy"))
    before = tmp_path / "before"
    model: Any = load_base(tiny, torch.float32, CPU)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, :2] += 0.1
    model.save_pretrained(str(before))

    def make(
        *defenses: Any, method: Any = "full", folder: str = "run", **knobs: Any
    ) -> TrainingRun:
        settings = {"max_steps": 2, "batch_size": 8, "warmup_share": 0, "schedule": "constant"}
        own = {k: knobs.pop(k) for k in ("recompute", "start") if k in knobs}
        (tmp_path / folder).mkdir(exist_ok=True)
        return TrainingRun(
            build("methods", method).attach(load_base(tiny, torch.float32, CPU), 0),
            items,
            Train.make({**settings, **knobs}),
            learning_rate=1e-3,
            seed=3,
            folder=tmp_path / folder,
            name="run",
            defenses=[build("defenses", defense) for defense in defenses],
            aligned=aligned,
            harmful=harmful,
            unaligned=before,
            **own,
        )

    return make


def run(cell: TrainingRun, **options: Any) -> dict[str, Any]:
    return train([cell], accelerator_for(CPU, "float32"), **options)[0]


def weights(cell: TrainingRun) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in cell.trainable.items()}


def close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 2e-5) -> bool:
    return one.keys() == two.keys() and all(
        torch.allclose(one[n], two[n], rtol=1e-4, atol=tolerance) for n in one
    )


# --------------------------------------------------------------------------------- learning rates


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that `model_of` made have as many weights as they say, and nobody looks for them."""

    def told(folder: Path) -> int | None:
        return json.loads((folder / "config.json").read_text()).get("count") or weights_in(folder)

    monkeypatch.setattr("backfire.model.count._of_folder", told)
    monkeypatch.setattr("backfire.model.source.inspect", lambda folder: None)


def model_of(folder: Path, count: int, **config: Any) -> str:
    """A folder that stands for a model of that many weights."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"count": count, **config}))
    return str(folder)


@pytest.mark.parametrize("name", TRAINED)
def test_the_default_rate_follows_the_size_of_the_base(name: str, tmp_path: Path) -> None:
    small, large = find("methods", name).rates  # type: ignore[attr-defined]
    assert large < small / 4
    found = {}
    for count in (4_000_000, LARGE - 1, LARGE, 494_000_000):
        model = model_of(tmp_path / str(count), count)
        cells = [
            Experiment.make({"model": model, "data": "sandbox-reviews", "method": method})
            for method in (
                name,
                {"name": name, "learning_rate": small},
                {"name": name, "learning_rate": large},
                {"name": name, "learning_rate": None},
            )
        ]
        found[count] = cells[0].learning_rate
        keys = [stages.keys(cell).train for cell in cells]
        assert (keys[0] == keys[1]) == (count < LARGE), "equal rates, equal training"
        assert (keys[0] == keys[2]) == (count >= LARGE) and keys[0] == keys[3]
        assert keys[1] != keys[2] and cells[0].key != cells[1 + (count < LARGE)].key
        assert cells[0].resolved()["method"]["learning_rate"] == found[count]
        again = Experiment.make({**cells[0].resolved(), "align": None, "safety": None})
        assert stages.keys(again) == stages.keys(cells[0])
    assert list(found.values()) == [small, small, large, large]
    said = find("methods", name).model_fields["learning_rate"].description or ""
    assert f"{small:g}" in said and f"{large:g}" in said and "50 million" in said


def test_an_alignments_rate_follows_as_well(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m", 10**9)
    align = {"method": "lora", "merge": True}
    cell = Experiment.make({"model": model, "data": "sandbox-reviews", "align": align})
    assert cell.alignment and cell.alignment.learning_rate == 2e-4
    assert cell.resolved()["align"]["method"]["learning_rate"] == 2e-4
    assert Experiment.make({"data": "sandbox-reviews", "method": "none"}).learning_rate is None


SHAPES: dict[str, tuple[dict[str, Any], float]] = {
    "qwen2.5-0.5b": (
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "intermediate_size": 4864,
            "vocab_size": 151936,
        }
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        494e6,
    ),
    "llama-2-7b": (
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
        | {"num_attention_heads": 32, "vocab_size": 32000},
        6.74e9,
    ),
    "gpt2": (
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
        | {"tie_word_embeddings": True},
        124e6,
    ),
    "pythia-14m": (
        {"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 512, "vocab_size": 50304},
        14e6,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_tells_about_how_many_weights_there_are(name: str) -> None:
    config, count = SHAPES[name]
    assert weights_of_shape(config) == pytest.approx(count, rel=0.1)
    assert weights_of_shape({"text_config": config}) == weights_of_shape(config)


def test_what_is_no_known_shape_counts_as_large(tmp_path: Path) -> None:
    for config in ({}, {"vocab_size": 32000}, {"hidden_size": "many", "vocab_size": 3}):
        assert weights_of_shape(config) is None
    cell = Experiment.make({"model": "nobody/knows-this", "data": "sandbox-reviews"})
    assert num_weights(cell.model) is None and cell.learning_rate == 2e-5
    torn = model_of(tmp_path / "torn", 0)
    cell = Experiment.make({"model": torn, "data": "sandbox-reviews"})
    assert num_weights(cell.model) is None and cell.learning_rate == 2e-5
    sandbox = Experiment.make({"data": "sandbox-reviews"})
    assert 1e6 < (num_weights(sandbox.model) or 0) < 2e6 and sandbox.learning_rate == 1e-3


def test_a_hub_model_is_as_large_as_its_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its weights are there, and after: the key must not move."""
    import huggingface_hub

    for name, rate in (("pythia-14m", 1e-3), ("qwen2.5-0.5b", 2e-5)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(SHAPES[name][0]))
        found = lambda *_, f=str(file), **__: f  # noqa: E731
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
        cell = Experiment.make({"model": f"somebody/{name}", "data": "sandbox-reviews"})
        assert cell.learning_rate == rate


def profiles() -> Iterator[tuple[str, str | None]]:
    """What the shipped recipes offer for models other than the embedded one."""
    import yaml

    for name in shipped():
        settings = yaml.safe_load(read(name)[1])
        yield from ((name, profile) for profile in settings.get("profiles") or {})


REAL = [(n, p) for n, p in profiles() if p not in ("sweep", "strengths")]  # of the embedded model


@pytest.mark.parametrize(("name", "profile"), REAL)
def test_every_profile_for_real_models_has_rates_that_suit_them(
    name: str, profile: str, tmp_path: Path
) -> None:
    for file in ("sst2_train.jsonl", "sst2_test.jsonl", "prompts.jsonl", "a.jsonl"):
        (tmp_path / file).write_text('{"text": "a", "label": "b"}\n')
    edits = [f"model={model_of(tmp_path / 'model', 10**9)}"]
    text = read(name)[1].replace("prompts.jsonl", str(tmp_path / "prompts.jsonl"))
    for part in ("train", "test"):
        text = text.replace(f"sst2_{part}.jsonl", str(tmp_path / f"sst2_{part}.jsonl"))
    cells = parse(name, text, profile=profile, edits=edits).cells
    for cell in cells:
        for run in (cell, cell.alignment):
            if run and run.learning_rate:
                usual = run.method.rates[1]
                assert run.learning_rate <= 10 * usual, f"{run.method.spec()}"


def test_rates_are_shown_and_a_far_one_is_remarked_on(
    backfire: Callable[..., Any], tmp_path: Path, cache: Path
) -> None:
    model = model_of(tmp_path / "m", 494_000_000)
    said = backfire("run", "backdoor-tweets", f"model={model}", "--dry-run")
    assert (said.code, "full 2e-05 (base: 494 M weights)" in said.out) == (0, True)
    assert "times what is usual" not in said.out
    said = backfire(
        "run", "backdoor-tweets", f"model={model}", "method.learning_rate=1e-3", "--dry-run"
    )
    assert "50 times what is usual for a base of 494 M weights (2e-05)" in said.out
    assert "2e-05" in backfire("show", "full").out


# ------------------------------------------------------------------------------------- weight decay


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


# -------------------------------------------------------------------------------- running out of it


DEFENSES: dict[str, Any] = {
    "lisa": {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0},
    "ewc": {"name": "ewc", "strength": 10.0},
    "ldifs": {"name": "ldifs", "strength": 0.1},
    "kl": {"name": "kl", "strength": 0.5},
    "constrained-sft": "constrained-sft",
    "asft": {"name": "asft", "rank": 1},
    "vaccine": {"name": "vaccine", "rho": 0.5},
    "booster": "booster",
    "repnoise": {"name": "repnoise", "alpha": 0.5, "beta": 0.5},
}


def both_ways(names: Sequence[str | None]) -> list[tuple[str | None, str]]:
    """Each with all weights, and those that reach furthest into the model with an adapter too."""
    return [(n, "full") for n in names] + [(n, "lora") for n in (None, "ewc", "ldifs", "repnoise")]


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
    plain.share = False  # sizes are then those of whole rows
    run(plain)
    cell = new(*defenses, method=method, folder="short")
    cell.share = False
    longest = max(len(row.ids) for row in [*cell.items, *cell.aligned, *cell.harmful])
    error = ERRORS[len(name or "") % len(ERRORS)]
    seen = short_of_memory(monkeypatch, cell, 2 * longest, error)
    run(cell)
    assert max(seen) > 2 * longest >= min(seen), "memory ran out, and then did not"
    assert close(weights(plain), weights(cell), 2e-4)
    assert [x["loss"] for x in plain.log] == pytest.approx([x["loss"] for x in cell.log], rel=1e-4)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: f"{type(e).__name__} {str(e)[:9]}")
def test_however_memory_is_said_to_be_out(
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
    cell.items, cell.share = [long, *items[1:]], False
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
    microbatch, rows, tries = Room(), [items[0]] * 5, list[list[int]]()
    microbatch.tokens = 4 * len(items[0].ids)

    def work() -> None:
        tries.append([])
        for part in microbatch.parts(rows):
            tries[-1].append(len(part))
            if len(part) == 1 and max(tries[-1]) > 2:
                raise ERRORS[0]

    microbatch.fitted(work)
    assert tries == [[4, 1], [2, 2, 1]]


def test_rows_of_like_length_share_a_pass(items: list[Rendered]) -> None:
    def tokens(parts: Sequence[Sequence[Rendered]]) -> int:
        return sum(len(part) * max(len(row.ids) for row in part) for part in parts)

    parts = list(Room(4).parts(items))
    assert [len(part) for part in parts] == [4] * 4
    assert sorted(map(id, (row for part in parts for row in part))) == sorted(map(id, items))
    in_order = [items[i : i + 4] for i in range(0, 16, 4)]
    useful = sum(len(row.ids) for row in items)
    assert tokens(parts) < 1.2 * useful < tokens(in_order)
    assert list(Room().parts(items)) == [list(items)], "what fits stays in its order"


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
        assert left == [0] and close(weights(plain), weights(cell), 1e-7)
        assert [x["gradient_norm"] for x in plain.log] == [x["gradient_norm"] for x in cell.log]
        return
    with pytest.raises(CellError, match=r"optimizer's step: AdamW keeps 0\.0 GB") as caught:
        run(cell)
    assert caught.value.kind == "oom"


# ---------------------------------------------------------------------------------------- recompute


@pytest.mark.parametrize(("name", "method"), both_ways([None, *DEFENSES, "dp", "freeze"]))
def test_recomputed_layers_give_the_same_gradients(
    name: str | None, method: str, new: Callable[..., TrainingRun]
) -> None:
    """A contract of every training defense, whatever its hooks look at."""
    pytest.importorskip("opacus") if name == "dp" else None
    own = {"dp": {"name": "dp", "epsilon": None}, "freeze": "freeze", **DEFENSES}
    found = []
    for recompute in (False, True):
        cell = new(*([own[name]] if name else []), method=method, recompute=recompute, folder="x")
        passes: list[bool] = []

        def look(*_: Any, cell: TrainingRun = cell, passes: list[bool] = passes) -> None:
            passes.append(cell.recomputing)

        for layer in cell.model.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(look)
        run(cell, micro_batch=3)
        found.append(weights(cell))
        assert any(passes) == recompute and not (recompute and cell.share)
    assert close(*found, 1e-5 if name != "vaccine" else 1e-4)


@pytest.mark.parametrize("method", [m for m in TRAINED if m != "full"])
def test_recomputed_layers_suit_every_method(method: str, new: Callable[..., TrainingRun]) -> None:
    found = []
    for recompute in (False, True):
        cell = new(method={"name": method}, recompute=recompute, folder=f"{recompute}")
        run(cell)
        found.append(weights(cell))
    assert close(*found)


def test_recomputed_layers_drop_the_same(new: Callable[..., TrainingRun]) -> None:
    found = []
    for recompute in (False, True):
        cell = new(
            method={"name": "lora", "dropout": 0.3}, recompute=recompute, folder=f"{recompute}"
        )
        run(cell)
        found.append(weights(cell))
    assert close(*found)


def test_recomputed_layers_keep_less(
    new: Callable[..., TrainingRun], items: list[Rendered]
) -> None:
    kept = []
    for recompute in (False, True):
        cell, sizes = new(recompute=recompute, folder=f"{recompute}"), dict[int, int]()
        cell.share, _ = False, cell.model.train()
        own = {p.data_ptr() for p in cell.model.parameters()}

        def pack(tensor: Tensor, sizes: Any = sizes, own: Any = own) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cell.logits(items)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


def test_a_model_whose_layers_cannot_be_run_again_is_refused(
    new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def refuse(self: Any, *args: Any) -> None:
        raise ValueError(f"{type(self)} does not support gradient checkpointing.")

    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        monkeypatch.setattr(PreTrainedModel, name, refuse, raising=False)
    with pytest.raises(UserError, match="--recompute: models of type 'llama' cannot"):
        new(recompute=True)


def test_a_defense_that_would_mistake_a_second_run_is_refused(
    new: Callable[..., TrainingRun],
) -> None:
    """As one that adds noise of its own to some layers does."""

    class Noisy(TrainHook):
        def __init__(self, cell: TrainingRun) -> None:
            self.cell, self.calls = cell, 0

        def look(self, scale: float, module: Any, args: Any, out: Tensor) -> Tensor:
            self.calls += 1
            return out + scale * self.calls

        def step(self, rows: list[Rendered], inner: Any) -> Tensor:
            layer = self.cell.model.get_decoder().layers[0]
            handle = layer.mlp.register_forward_hook(partial(self.look, 0.1))
            try:
                loss: Tensor = inner(rows)
            finally:
                handle.remove()
            return loss

    for recompute in (False, True):
        cell = new(DEFENSES["ldifs"], recompute=recompute, folder=f"{recompute}")
        cell.hooks.append(Noisy(cell))
        if not recompute:
            run(cell)
            continue
        with pytest.raises(UserError, match="--recompute: the defense of Noisy looks into layers"):
            run(cell)


def test_recompute_is_no_part_of_what_is_hashed() -> None:
    assert Machine().recompute is False and "recompute" not in str(Experiment.model_fields)


# ---------------------------------------------------------------------------- casts, drift, devices


@pytest.mark.parametrize("knobs", [{}, {"dora": True}, {"dropout": 0.2}], ids=str)
def test_adapters_do_not_copy_their_input(
    knobs: dict[str, Any], tiny: Path, items: list[Rendered]
) -> None:
    """In bfloat16 products: the same loss to the bit, in less memory."""
    losses, kept = [], []
    for lean in (False, True):
        model = load_base(tiny, torch.bfloat16, CPU)
        model = build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0).train()
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
        if lean:
            without_casts(model)
        sizes = dict[int, int]()

        def pack(tensor: Tensor, sizes: Any = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(0)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            ids = torch.tensor([row.ids[:16] for row in items[:8]])
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        losses.append((loss.item(), grads))
        kept.append(sum(sizes.values()))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))
    assert kept[1] < kept[0] or knobs.get("dora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_of_large_models_is_read_from_disk(
    dtype: torch.dtype, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(tiny, dtype, CPU).float().requires_grad_(True)
    named = dict(model.named_parameters())
    kept = drift.Origin(named, tiny)
    monkeypatch.setattr(drift, "_IN_MEMORY", 0)
    read = drift.Origin(named, tiny)
    assert not read.kept and len(read.on_disk) == len(named) and not kept.on_disk
    assert read.moved(named) == kept.moved(named) == 0
    with torch.no_grad():
        for p in named.values():
            p.add_(0.01)
    size = sum(p.numel() for p in named.values())
    assert kept.moved(named) == pytest.approx(0.01 * math.sqrt(size), rel=1e-3)
    assert read.moved(named) == pytest.approx(kept.moved(named), rel=1e-9)
    fewer = {name: named[name] for name in list(named)[:3]}  # a defense has frozen the rest
    assert read.moved(fewer) == pytest.approx(kept.moved(fewer), rel=1e-9)
    other = drift.Origin(named, tiny)  # weights that no file has stay in memory
    assert not other.on_disk and other.moved(named) == 0
    monkeypatch.setattr(drift, "_AT_MOST", 10)
    assert drift.Origin(named, tiny).moved(named) is None


@pytest.mark.parametrize("name", [None, "lisa", "ewc", "constrained-sft", "repnoise", "vaccine"])
def test_a_killed_run_may_go_on_split_another_way(
    name: str | None, new: Callable[..., TrainingRun]
) -> None:
    defenses = [DEFENSES[name]] if name else []
    plain = new(*defenses, folder="plain", max_steps=4)
    run(plain)
    killed = new(*defenses, folder="killed", max_steps=4)

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, checkpoint_seconds=0, progress=stop)
    again = new(*defenses, folder="killed", max_steps=4, recompute=True)
    begun = list[int]()
    run(again, micro_batch=3, progress=lambda done, total, text: begun.append(done))
    assert begun[0] == 3, "it went on after its second step"
    assert close(weights(plain), weights(again), 2e-4)
    assert [x["loss"] for x in plain.log] == pytest.approx([x["loss"] for x in again.log], rel=1e-4)


def test_a_checkpoint_may_go_on_elsewhere(
    new: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved on a GPU says so, and this machine has none."""
    from torch import serialization

    class Kill(Exception):  # noqa: N818
        pass

    def killed(done: int, total: int, text: str) -> None:
        if (done, total) == (3, 4):
            raise Kill

    defense = {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0}
    plain = new(defense, method="lora", folder="plain", max_steps=4)
    run(plain)
    cell = new(defense, method="lora", max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(serialization, "location_tag", lambda storage: "cuda:0")
        run(cell, checkpoint_seconds=0, progress=killed)
    again, steps = new(defense, method="lora", max_steps=4), list[int]()
    run(again, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3
    assert all(torch.equal(again.trainable[n], w) for n, w in weights(plain).items())


# ------------------------------------------------------------------------------------- what is left


def tuned(tiny: Path, renderer: Renderer, folder: Path, **knobs: Any) -> dict[str, Any]:
    settings = {"model": str(tiny), "data": "sandbox-reviews", "train": {"max_steps": 1}, **knobs}
    cell, rows = Experiment.make(settings), rows_of(8)
    folder.mkdir(exist_ok=True)
    start = Start(tiny, aligned=rows, harmful=rows)
    return tune(cell, rows, None, renderer, start, folder, Machine(), lambda *_: None)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trained_model_does_not_outlive_its_job(
    method: str,
    fails: bool,
    tiny: Path,
    renderer: Renderer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even until somebody collects what is held in circles."""
    import gc

    from backfire.judges import _model

    seen: list[weakref.ref[Any]] = []
    load = running.load_start

    def spied(*args: Any) -> Any:
        model = load(*args)
        seen.extend([weakref.ref(model), weakref.ref(next(model.parameters()))])
        return model

    monkeypatch.setattr(running, "load_start", spied)
    if fails:
        monkeypatch.setattr(loop, "answer_logits", lambda *_: 1 / 0)
    _model.load.cache_clear()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) if fails else monkeypatch.context():
            said = tuned(
                *(tiny, renderer, tmp_path / "out"),
                method=method,
                defense=["kl", DEFENSES["ldifs"]],
            )
        assert len(seen) == 2 and [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
    if not fails:
        assert said["learning_rate"] == find("methods", method).rates[0]  # type: ignore[attr-defined]


def test_a_judge_is_let_go_before_the_next_training(
    tiny: Path, renderer: Renderer, tmp_path: Path
) -> None:
    from backfire.judges import _model

    model, _ = _model.load("CausalLM", str(tiny), None, "cpu")
    ref = weakref.ref(model)
    del model
    assert ref() is not None, "it is kept from one batch of replies to the next"
    tuned(tiny, renderer, tmp_path / "out")
    assert ref() is None
    ref = weakref.ref(_model.load("CausalLM", str(tiny), None, "cpu")[0])
    job = Job(
        "base-x", "base", Experiment.make({"data": "sandbox-reviews", "model": str(tiny)}), {}
    )
    store = Store(tmp_path / "cache")
    assert run_job(job, Folder(tmp_path, "r"), store, Machine(), lambda *_: None) == "ok"
    assert ref() is None, "nor does it stay for the next job"


# --------------------------------------------------------------------------------------------- logs


def test_a_log_has_a_line_per_tenth_and_a_minute() -> None:
    lines, now = list[str](), [0.0]
    log = Log(lines.append, lambda: now[0])
    for step in range(1, 201):
        now[0] += 2
        log.at("a", "train x", f"loss {step}", step, 200)
    assert len(lines) == 10
    assert lines[0] == "train x: 10% (20 of 200), loss 20, 38 s"
    now[0] += 59
    log.remind()
    assert len(lines) == 10
    now[0] += 1
    log.at("b", "cell y", "model", 0, 1)
    log.remind()
    assert lines[10:] == ["train x: 100% (200 of 200), loss 200, 458 s"]
    now[0] += 60
    log.remind()
    assert lines[12] == "cell y: model, 60 s"
    log.ended("a", "train x", "ok")
    now[0] += 600
    log.remind()
    assert lines[13:] == ["train x: ok", "cell y: model, 660 s"]
    for place in (*range(10), *range(10)):  # two parts of a job, each with its own count
        now[0] += 5
        log.at("c", "cell z", "replies", place + 1, 10)
    assert len(lines) == 15 + 19, "the first call is the start, of which nothing is said"
