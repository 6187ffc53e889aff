"""The base in memory is, after every use, bit for bit the base as it was loaded."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine
from backfire.model import load
from backfire.model.fused import rounded_once
from backfire.model.head import for_evaluation
from backfire.model.load import load_base, load_tuned, with_adapters
from backfire.model.resident import Resident, Source, _hash
from backfire.registry import build, names
from backfire.tokenizer import load_tokenizer
from backfire.train import finetune
from backfire.train.finetune import Start, tune

CPU = torch.device("cpu")
ADAPTERS = [name for name in names("methods") if build("methods", name).adapts]
QUANTIZED = [name for name in ADAPTERS if build("methods", name).quantization("cpu")]
BELOW = {"name": "lora", "rank": 2, "learning_rate": 3e-2}


def slowly(method: str) -> Any:
    return pytest.param(method, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def loads() -> Iterator[Callable[[], int]]:
    """The number of models loaded so far in this test."""
    load.loads.clear()
    yield load.loads.total


def cell_of(tiny: Path, method: Any, **train: Any) -> Experiment:
    settings = {"data": "sandbox-reviews", "template": "sentiment-line", "method": method}
    steps = {"max_steps": 2, "batch_size": 4, **train}
    return Experiment.make({"model": str(tiny), **settings, "train": steps})


def train(tiny: Path, method: Any, folder: Path, resident: Resident | None, **options: Any) -> Path:
    """Two steps, in the resident base or, without one, in its own."""
    folder.mkdir()
    cell, rows = cell_of(tiny, method, compute="bfloat16"), build("datasets", "sandbox-reviews")
    start, machine = options.pop("start", Start(tiny)), Machine(device="cpu", **options)
    renderer = Renderer(cell.template, load_tokenizer(tiny), 512)
    given = rows.load("train")[:8], None, renderer, start, folder, machine, lambda *_: None
    tune(cell, *given, resident)
    return folder


def source_of(tiny: Path, method: str, dtype: torch.dtype = torch.float32) -> Source:
    return Source(tiny, dtype, CPU, build("methods", method).quantization("cpu"))


def everything(model: Any) -> dict[str, Any]:
    """What can be seen of a model, its outputs included."""
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    states = [vars(module) for module in model.modules()]
    hooks = [
        len(value) for state in states for name, value in state.items() if "hook" in name and value
    ]
    return {
        "logits": logits,
        "weights": {n: w for n, w in model.state_dict().items() if isinstance(w, Tensor)},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [sorted(name for name in state if name != "state") for state in states],
        "training": [module.training for module in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "hooks": hooks,
        "config": {n: v for n, v in vars(model.config).items() if n != "quantization_config"},
    }


def assert_same(one: Any, two: Any) -> None:
    found, wanted = everything(one), everything(two)
    assert torch.equal(found.pop("logits"), wanted.pop("logits"))
    ours, theirs = found.pop("weights"), wanted.pop("weights")
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert found == wanted


# ---------------------------------------------------------------------------- training in the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ADAPTERS)
def test_after_a_method_the_base_is_as_it_was_loaded(
    method: str, dtype: torch.dtype, tiny: Path, tmp_path: Path, loads: Callable[[], int]
) -> None:
    source, resident = source_of(tiny, method, dtype), Resident()
    fresh = load_base(tiny, dtype, CPU, source.quantization).requires_grad_(False)
    resident.model(source)
    assert loads() == 2
    cell = cell_of(tiny, method)
    attach = partial(finetune._attached, cell, Start(tiny), "bfloat16")
    with resident.attached(source, attach) as model:
        model.train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=torch.arange(20)[None]).logits.sum()
        loss.backward()
    bare: Any = resident.model(source)
    assert type(bare) is type(fresh) and loads() == 2
    assert_same(bare, fresh)


@pytest.mark.parametrize("method", ["lora", *map(slowly, ["llama-adapter", *QUANTIZED])])
def test_a_trained_adapter_is_the_same_from_a_used_base(
    method: str, tiny: Path, tmp_path: Path, loads: Callable[[], int]
) -> None:
    """The base was trained in, with recomputed layers and an adapter below, and evaluated."""
    resident, spec = Resident(), {"name": method, "learning_rate": 3e-2}
    below = train(tiny, spec, tmp_path / "below", resident, recompute=True)
    resident.model(source_of(tiny, method), below)
    if method != "llama-adapter":
        start = Start(tiny, below, tiny)
        above = train(tiny, spec, tmp_path / "above", resident, start=start)
        resident.model(source_of(tiny, method), above, below)
    ours = train(tiny, spec, tmp_path / "ours", resident)
    assert loads() == 1
    theirs = train(tiny, spec, tmp_path / "theirs", None)
    name = "adapter_model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", *map(slowly, ["ia3", "llama-adapter", *QUANTIZED])])
def test_saved_adapters_are_evaluated_without_loading(
    method: str, tiny: Path, tmp_path: Path, loads: Callable[[], int]
) -> None:
    resident, source = Resident(), source_of(tiny, method)
    one = train(tiny, {"name": method, "learning_rate": 3e-2}, tmp_path / "one", resident)
    two = train(tiny, {"name": method, "learning_rate": 5e-2}, tmp_path / "two", resident)
    found = [everything(resident.model(source, folder))["logits"] for folder in (one, None, two)]
    assert resident.model(source, two) is resident.model(source, two)
    assert loads() == 1
    for logits, folder in zip(found, (one, tiny, two), strict=True):
        loaded = load_tuned(folder, tiny, torch.float32, CPU, source.quantization)
        assert torch.equal(logits, everything(loaded)["logits"])
    assert not torch.equal(found[0], found[2])


def test_weights_that_are_joined_with_an_adapter_are_in_memory_once(
    tiny: Path, loads: Callable[[], int]
) -> None:
    """In training, and in evaluation; afterwards the base is as it was loaded."""
    resident, source = Resident(), source_of(tiny, "lora", torch.bfloat16)
    fresh = load_base(tiny, torch.bfloat16, CPU).requires_grad_(False)
    attach = partial(finetune._attached, cell_of(tiny, "lora"), Start(tiny), "bfloat16")
    for joined in (lambda model: rounded_once(model, "bfloat16"), for_evaluation):
        with resident.attached(source, attach) as model:
            layer: Any = model.get_base_model().model.layers[0].mlp.up_proj  # type: ignore[operator]
            before = weakref.ref(layer.base_layer.weight.untyped_storage())
            with joined(model.eval()):
                assert before() is None
    assert_same(resident.model(source), fresh)
    assert loads() == 2


# ------------------------------------------------------------------------------ when it is not kept


def test_a_base_whose_weights_are_trained_is_not_kept(
    tiny: Path, tmp_path: Path, loads: Callable[[], int]
) -> None:
    resident, source = Resident(), source_of(tiny, "lora")
    before = everything(resident.model(source))
    train(tiny, "full", tmp_path / "full", resident)
    assert loads() == 1 and resident._base is None
    assert torch.equal(everything(resident.model(source))["logits"], before["logits"])
    assert loads() == 2


def test_a_base_that_was_changed_in_place_is_not_kept(tiny: Path, loads: Callable[[], int]) -> None:
    """As a repair or a plug-in may do, even behind PyTorch's back."""
    resident, source = Resident(), source_of(tiny, "lora")
    before = everything(resident.model(source))
    with resident.attached(source, lambda model: model) as model:
        next(model.parameters()).data[3, 1] += 1
    assert torch.equal(everything(resident.model(source))["logits"], before["logits"])
    assert loads() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_kind_of_change_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(96, 500) * 50).to(dtype)
    negated, fewer, moved, one = -weight, weight.clone(), weight.flip(0), weight.clone()
    fewer[2:5] *= -1
    one[95, 499] += 1
    hashes = {_hash(x) for x in (weight, negated, fewer, moved, weight.roll(1, 0), one)}
    assert len(hashes) == 6 and _hash(weight.clone()) == _hash(weight) in hashes
    small = weight[0, :64]
    assert len({_hash(x) for x in (small, -small, small.flip(0), small.roll(8))}) == 4
    assert _hash(weight[:0]) == 0


@pytest.mark.parametrize("error", [CellError("nan", "Not finite."), torch.OutOfMemoryError("no")])
def test_a_failure_drops_the_base(error: Exception, tiny: Path, loads: Callable[[], int]) -> None:
    resident, source = Resident(), source_of(tiny, "lora")
    attach = partial(finetune._attached, cell_of(tiny, "lora"), Start(tiny), "float32")
    with pytest.raises(type(error)), resident.attached(source, attach):
        raise error
    fresh = load_base(tiny, torch.float32, CPU).requires_grad_(False)
    assert_same(resident.model(source), fresh)
    assert loads() == 3


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(
    tiny: Path, tmp_path: Path, loads: Callable[[], int]
) -> None:
    resident, source = Resident(), source_of(tiny, "lora")
    good = train(tiny, BELOW, tmp_path / "good", resident)
    bad = tmp_path / "bad"
    bad.mkdir()
    config = (good / "adapter_config.json").read_text("utf-8")
    (bad / "adapter_config.json").write_text(config.replace('"r": 2', '"r": 3'), "utf-8")
    os.link(good / "adapter_model.safetensors", bad / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit the base"):
        resident.model(source, bad)
    wanted = everything(with_adapters(load_base(tiny, torch.float32, CPU), good))["logits"]
    assert torch.equal(everything(resident.model(source, good))["logits"], wanted)


def test_only_one_base_is_in_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is gone before the second is loaded."""
    resident, alive = Resident(), list[Any]()
    first = weakref.ref(resident.model(source_of(tiny, "lora")))

    def spied(*args: Any) -> Any:
        alive.append(first())
        return load_base(*args)

    monkeypatch.setattr(load, "load_base", spied)
    resident.model(source_of(tiny, "lora", torch.bfloat16))
    assert alive == [None]


def test_a_folder_that_is_written_again_is_loaded_again(
    tiny: Path, tmp_path: Path, loads: Callable[[], int]
) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    resident = Resident()
    resident.model(source_of(folder, "lora"))
    resident.model(source_of(folder, "lora"))
    assert loads() == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    resident.model(source_of(folder, "lora"))
    assert loads() == 2
