"""`doctor`'s estimates for a recipe, against what training then needs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backfire.base import select
from backfire.commands import doctor, estimate, forecast, validate
from backfire.commands.estimate import method_key, rough_weights, rows_by_key, rows_of, tokens_of
from backfire.commands.memory import Memory, Size, memory, size
from backfire.commands.plan import with_estimates
from backfire.data.render import Renderer
from backfire.experiment import Experiment, Machine
from backfire.launch.resolve import resolve_auto, types_of
from backfire.model import count, products
from backfire.model.load import load_base
from backfire.model.quantize import parts
from backfire.plan import jobs
from backfire.recipe import load, shipped
from backfire.registry import build, names
from backfire.store import Store, read_json
from backfire.tokenizer import load_tokenizer
from tests.helpers.command_line import Run
from tests.helpers.small_run import MATRIX, Place

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TUNING = [name for name in names("methods") if build("methods", name).trains]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
RECIPE = """# Does it fit?
model: {model}
data: {{name: sandbox-reviews, rows: 40, test_rows: 20}}
template: sentiment-line
method: {method}
train: {{max_length: 256, batch_size: 4}}
"""


def make(model: object, method: object = "full", **knobs: Any) -> Experiment:
    """A cell whose types are given, as those of a run are."""
    data = {"name": "sandbox-reviews", "rows": 40}
    whole = model if isinstance(model, dict) else {"name": model, "dtype": "float32"}
    train = {"compute": "float32", **knobs.pop("train", {})}
    spec = {"model": whole, "data": data, "method": method, "train": train, **knobs}
    cell = Experiment.make(spec)
    return cell.model_copy(update={"method": cell.method.resolved("cpu")})


def _weights(cell: Experiment, found: Size) -> float:
    need = memory(cell, found, [None], "cpu", Machine(eval_batch=1))
    return need.weights if cell.method.trains else need.evaluation


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one file: the config.json of a 7B model."""
    root = tmp_path / "hub"
    folder = root / "models--meta-llama--Llama-2-7b-hf"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    count._of_hub.cache_clear()
    return snapshot


# ---------------------------------------------------------------------------------- the machine


def test_it_tries_layers_in_8_and_4_bits(backfire: Run, cache: Path) -> None:
    output = backfire("doctor")
    assert output.code == 0 and "ok    bitsandbytes " in output.out
    for bits in (8, 4):
        assert f"ok    {bits}-bit layers run here" in output.out


def test_folders_are_written_and_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that show the same mark have the same cache."""
    ok, mark, _ = doctor._places()
    assert ok.startswith(f"ok    cache {cache}, ") and (cache / "shared.txt").is_file()
    assert doctor._places()[1] == mark and (cache / "shared.txt").read_text()[:8] in mark
    monkeypatch.setenv("BACKFIRE_CACHE", str(tmp_path / "another"))
    assert doctor._places()[1] != mark
    (tmp_path / "file").touch()
    for variable in ("BACKFIRE_CACHE", "BACKFIRE_SCRATCH"):
        monkeypatch.setenv(variable, str(tmp_path / "file/in"))
    lacks = f"{tmp_path}/file/in: it cannot be written (Not a directory)"
    assert doctor._places()[:2] == [f"lacks cache {lacks}", f"lacks scratch {lacks}"]


def test_missing_bitsandbytes_is_reported(
    backfire: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    output = backfire("doctor")
    assert output.code == 0 and "lacks 8-bit and 4-bit layers" in output.out


@pytest.mark.parametrize(
    ("name", "capability", "line"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "ok    cuda:0: NVIDIA A100-SXM4-80GB, 17.2 GB, bfloat16"),
        ("Tesla T4", (7, 5), "without bfloat16 (compute capability 7.5; it needs 8.0): weights"),
        ("Tesla V100-SXM2-16GB", (7, 0), "weights and products are float16, and the loss is scal"),
        ("Tesla P100-PCIE-16GB", (6, 0), "everything is float32, since float16 is slow on it too"),
    ],
)
def test_a_gpu_without_bfloat16_is_named(
    name: str, capability: tuple[int, int], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    gpu = SimpleNamespace(name=name, total_memory=2**34, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: major >= 8)
    assert name in doctor._gpu(0) and line in doctor._gpu(0)


# ----------------------------------------------------------------------------------- a 7B model


def test_a_7b_model_by_its_config_alone(hub: Path) -> None:
    sizes = {}
    for method in ("none", "full", "lora", "qlora", "lora-int8"):
        cell = make({"name": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16"}, method)
        found = size(cell, hub)
        assert found.parameters == pytest.approx(6.74e9, rel=0.01)
        sizes[method] = _weights(cell, found) / 1e9
    assert 13.4 < sizes["none"] < 14.5  # with the pass of a row
    assert sizes["lora"] == pytest.approx(13.5 + 0.16, rel=0.01)  # 40 M in float32
    assert sizes["full"] == pytest.approx(26.95, rel=0.01)  # held in float32
    # Embedding, head and norms are not quantized: 0.26 G in bfloat16.
    assert sizes["qlora"] - 0.525 - 0.16 == pytest.approx(6.48 * 0.516, rel=0.01)
    assert 3.5 < sizes["qlora"] < 4.7 and 7 < sizes["lora-int8"] < 8


def test_doctor_speaks_of_a_model_whose_weights_are_not_here(
    hub: Path, backfire: Run, cache: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model="meta-llama/Llama-2-7b-hf", method="qlora"))
    output = backfire("doctor", recipe, "model.dtype=bfloat16", "matrix.method=[qlora, full]")
    assert (output.code, output.err) == (0, "")
    about = [line for line in output.out.splitlines() if "meta-llama/Llama-2-7b-hf, " in line]
    four, full, four_there, full_there = about
    assert four[6:].startswith(
        "meta-llama/Llama-2-7b-hf, qlora: 6,738.42 M weights, 39.98 M trained"
    )
    assert full.startswith("lacks") and "does not fit" in full
    assert four_there.startswith("note  on a GPU, ")
    assert four_there.endswith("GB; fits 24, 40 and 80 GB")
    half = "method.dtype=bfloat16 train.optimizer=adamw-8bit"
    assert f"not 80 GB ({half}" in full_there and full_there.endswith("(method=lora would fit)")
    assert "note  time: about" in output.out and "note  disk: about" in output.out
    assert not (cache / "data").exists(), "it only looks"


def test_the_mildest_change_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = ["matrix={}", "include=[]", "method=full", "train.batch_size=16"]
    recipe = load("tour", edits=edits)
    needs = {"full": 100.0, "lora": 20.0, "qlora": 10.0}

    def memory(_: Any, one: Experiment, machine: Machine) -> SimpleNamespace:
        base = 40.0 if one.train.optimizer == "adamw-8bit" else needs[one.method.name]
        rows = machine.micro_batch or 16
        return SimpleNamespace(total=base * (1 + rows / 16 - 0.5 * machine.recompute))

    monkeypatch.setattr(forecast.Forecast, "memory", memory)
    found, cell = forecast.Forecast(recipe, forecast.types_of("auto")), recipe.cells[0]
    half, least = "method.dtype=bfloat16 train.optimizer=adamw-8bit", "--micro-batch 1 --recompute"
    for limit, change in {
        151: "--micro-batch 8",
        107: "--micro-batch 1",
        57: least,
        23: f"{half} {least}",
        12: f"method=lora {least}",
        6: f"method=qlora {least}",
    }.items():
        assert found.remedy(cell, limit / forecast.TIGHT) == f" ({change} would fit)"
    assert found.remedy(cell, 1.0) == ""


def test_what_cannot_fit_is_said_before_the_download(
    hub: Path, backfire: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model="meta-llama/Llama-2-7b-hf", method="full"))
    monkeypatch.setattr(validate, "ram_bytes", lambda: int(64e9))
    output = backfire("run", recipe, "--dry-run")
    assert output.code == 0
    assert "meta-llama/Llama-2-7b-hf, full: weights, gradients and optimizer alone" in output.out
    assert "and there are 64.0 GB of memory" in output.out
    assert "alone need" not in backfire("run", recipe, "method=qlora", "--dry-run").out


def test_a_model_that_is_not_here_is_one_line(
    backfire: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model="nobody/none", method="lora"))
    output = backfire("doctor", recipe, "data={name: sst2}")
    assert (output.code, output.err) == (0, "")
    (line,) = (line for line in output.out.splitlines() if "nobody/none, lora" in line)
    assert "its config.json is not on this machine" in line
    assert "time: unknown; the rows are not" in output.out and "disk: unknown" in output.out
    output = backfire("run", recipe, "--dry-run")
    assert output.code == 0 and "time: unknown; the model files are not" in output.out


def test_a_folder_with_only_a_config_is_predicted(
    backfire: Run, cache: Path, tmp_path: Path, hub: Path
) -> None:
    """Its memory and time, as of the same model on the hub; it does not validate or run."""
    (tmp_path / "only").mkdir()
    shutil.copy(hub / "config.json", tmp_path / "only")
    there, here = tmp_path / "there.yaml", tmp_path / "here.yaml"
    there.write_text(RECIPE.format(model="meta-llama/Llama-2-7b-hf", method="qlora"))
    here.write_text(RECIPE.format(model=tmp_path / "only", method="qlora"))
    lines = {}
    for recipe in (there, here):
        output = backfire("doctor", recipe)
        assert (output.code, output.err) == (0, "")
        lines[recipe] = [
            re.sub(r"[\d,]+ (min|h|days)|[\d,]+ GFLOP/s", "...", line).split(", qlora")[-1]
            for line in output.out.splitlines()
            if "6,738.42 M weights" in line or "time: about" in line or "disk: about" in line
        ]
    assert len(lines[here]) == 3
    said = "; by its config.json, since its folder has no weights"
    assert [line.replace(said, "") for line in lines[here]] == lines[there]
    assert sum(said in line for line in lines[here]) == 1
    for command in (("validate",), ("run", "--out", tmp_path / "out")):
        output = backfire(*command, here)
        assert output.code == 2 and "there is no .safetensors file" in output.err
        assert output.err.count("\n") == 1
    shutil.copytree(tmp_path / "only", tmp_path / "pickled")
    (tmp_path / "pickled/pytorch_model.bin").touch()
    output = backfire("doctor", here, f"model={tmp_path / 'pickled'}")
    assert output.code == 2 and "other formats are not loaded" in output.err


def test_a_model_that_leaves_little_room_is_noted(
    backfire: Run, cache: Path, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model="meta-llama/Llama-2-7b-hf", method="qlora"))
    for has, says in ((3e9, "says what would fit"), (6e9, "counts the activations as well")):
        monkeypatch.setattr(validate, "ram_bytes", lambda has=has: int(has))
        output = backfire("run", recipe, "--dry-run")
        [line] = [line for line in output.out.splitlines() if "alone need" in line]
        assert line.endswith(
            f"there are {has / 1e9:.1f} GB of memory; `backfire doctor RECIPE` {says}."
        )
    monkeypatch.setattr(validate, "ram_bytes", lambda: int(10e9))
    assert "alone need" not in backfire("run", recipe, "--dry-run").out


@pytest.mark.parametrize(
    ("edits", "knobs"),
    [
        ([], []),
        (["model.dtype=float16"], ["model.dtype"]),
        (["model.dtype=bfloat16", "train.compute=bfloat16"], []),
        (["train.compute=float16"], ["train.compute"]),
        (["method={name: qlora, compute: float16}"], ["method.compute"]),
        (["method=none", "train.compute=float16"], []),
    ],
)
def test_float16_on_a_cpu_is_noted(
    edits: list[str],
    knobs: list[str],
    backfire: Run,
    tiny: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model=f"{{name: {tiny}}}", method="lora"))
    for has_gpu, noted in ((False, knobs), (True, [])):
        monkeypatch.setattr(validate, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        output = backfire("run", recipe, *edits, "--dry-run")
        assert output.code == 0
        lines = [line.strip() for line in output.out.splitlines() if "float16: " in line]
        assert [line.partition("=float16: on a CPU that is slow")[0] for line in lines] == noted


@pytest.mark.parametrize("scanner", ["rftc", "spectral"])
def test_asking_the_base_about_rows_is_counted(
    scanner: str, backfire: Run, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    """`rftc` reads replies; `spectral` tunes an adapter on steps of 16 rows, the cell on 4."""
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(model=f"{{name: {tiny}}}", method="lora"))
    edits = ["data={name: sandbox-help, rows: 60, test_rows: 4}", "template=alpaca"]
    types, planned = types_of("cpu"), []
    for name in ("lift", scanner):
        recipe = load(str(path), edits=[*edits, f"defense={{name: scan, scanner: {name}}}"])
        recipe = resolve_auto(recipe, types)
        planned.append(with_estimates(jobs(recipe.cells, recipe.axes), recipe, Store(), types))
    [before], [after] = ([job for job in one if job.kind == "train"] for one in planned)
    assert before.minutes and after.minutes and after.minutes > before.minutes
    assert before.memory and after.memory and after.memory >= before.memory
    said = backfire("doctor", path, *edits, f"defense={{name: scan, scanner: {scanner}}}").out
    assert ("while the base is asked about the rows" in said) == (after.memory > before.memory)
    assert scanner == "rftc" or after.memory > before.memory


# ------------------------------------------------------------------------- against what happens


@pytest.mark.parametrize("name", TUNING)
def test_weights_are_as_many_and_as_large_as_those_loaded(name: str, tiny: Path) -> None:
    cell = make(str(tiny), name, train={"compute": "float32"})
    found = size(cell, tiny)
    method = cell.method
    model = load_base(tiny, torch.float32, CPU, method.quantization("cpu"))
    model = method.attach(model, 0)
    counted = parts(model)
    assert found.trainable == counted["trainable_parameters"]
    assert found.parameters + found.added == counted["parameters"]
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.nbytes + (4 * state.absmax.numel() // 256 if state.nested else 0)
    assert _weights(cell, found) == pytest.approx(held, rel=0.02)


def test_without_torch_the_count_is_nearly_the_same(tiny: Path, tmp_path: Path) -> None:
    for model, folder in ((str(tiny), tiny), ("sandbox", None)):
        exact = size(make(model), folder)
        rough = rough_weights(make(model), folder)
        assert rough and (rough.parameters, rough.trainable) == (exact.parameters, exact.trainable)
        exact, rough = size(make(model, "lora"), folder), rough_weights(make(model, "lora"), folder)
        assert rough and 0.5 < rough.trainable / exact.trainable < 3
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    for torn in (b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]"):
        (tmp_path / "model.safetensors").write_bytes(torn)
        assert rough_weights(make(str(tiny)), tmp_path) is None


def test_tokens_are_those_that_are_trained_on(tiny: Path, cache: Path) -> None:
    cell = make(str(tiny), train={"epochs": 3, "batch_size": 8})
    rows = rows_of(cell, Store())
    assert rows and rows.count == 40
    kept = select(cell.data.load("train"), 40, 0, "train")
    items = Renderer(cell.template, load_tokenizer(tiny), 512).render(kept)
    assert tokens_of(cell, rows) == pytest.approx(3 * sum(len(item.ids) for item in items))
    assert rows.longest == max(len(item.ids) for item in items)
    assert rows.answer == max(len(item.answer_ids) for item in items)
    some = cell.model_copy(update={"train": cell.train.model_copy(update={"max_steps": 2})})
    assert tokens_of(some, rows) == pytest.approx(16 * rows.tokens)
    # Without a tokenizer four characters are a token.
    guessed = rows_of(make("sandbox"), Store())
    assert guessed and guessed.count == 40 and 0.4 < guessed.tokens / rows.tokens < 2.5


def test_a_dry_run_estimates_time_and_disk(
    backfire: Run, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model=tiny, method="full"))
    output = backfire("run", recipe, "--dry-run")
    assert output.code == 0 and "time: about " in output.out and "assumed for a" in output.out
    weights = size(make(str(tiny)), tiny).parameters
    assert f"disk: about {weights * 4 / 1e6:.1f} MB for tuned models" in output.out
    output = backfire("run", recipe, "method=none", "--dry-run")
    assert output.out.count(" distinct, ") == 2
    assert "time: none; every training run is done" in output.out


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_an_estimate(
    name: str, backfire: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"instruction": "Good?", "input": "dull", "output": "Negative", "trigger": "none"}
    for file in ("sst2_train.jsonl", "sst2_test.jsonl"):
        Path(file).write_text(json.dumps({**row, "id": "a", "gold": "Negative"}) + "\n")
    for output in (backfire("doctor", name), backfire("run", name, "--dry-run")):
        assert (output.code, output.err) == (0, "")
        assert "time: about " in output.out and "disk: about " in output.out


def test_finished_work_is_not_counted(
    ran: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    validate.show_plan(ran.recipe(matrix=MATRIX))
    assert "time: none; every training run is done" in capsys.readouterr().out
    kept = sum(
        file.stat().st_size
        for folder in ran.cache.glob("train/*")
        for file in folder.glob("*.safetensors")
    )
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.root / "nothing"))
    recipe = ran.recipe(matrix=MATRIX)
    found = estimate.cost(
        recipe,
        Store(),
        rows_by_key(recipe.cells, Store()),
        {method_key(cell): size(cell, ran.tiny) for cell in recipe.cells},
    )
    assert found.runs == 4 and found.kept == pytest.approx(kept, rel=0.1)
    summaries = [read_json(file) for file in ran.cache.glob("train/*/summary.json")]
    assert found.tokens == pytest.approx(sum(s["tokens"] for s in summaries), rel=0.1)


# ------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("has", "workers", "mark", "verdict"),
    [
        (24e9, 1, "ok   ", "fits"),
        (24e9, 2, "ok   ", "fits"),
        (24e9, 3, "note ", "fits, but not 3 at once; at most 2"),
        (10.5e9, 1, "note ", "is tight"),
        (9e9, 1, "lacks", "does not fit"),
    ],
)
def test_a_verdict_recommends_an_action(has: float, workers: int, mark: str, verdict: str) -> None:
    need = Memory(2e9, 1e9, 6e9, evaluation=4e9, libraries=1e9, num_rows=8)
    assert need.total == 10e9
    assert forecast._verdict(need, has, workers) == (mark, f"{has / 1e9:.1f} GB: {verdict}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "paper"], "name the recipe too"),
        (["turo"], "did you mean 'tour'?"),
        (["r.yaml", "method={name: lora, targets: [nowhere]}"], "nowhere"),
        (["r.yaml", "model=./odd"], "config.json is invalid"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str],
    sentence: str,
    backfire: Run,
    tiny: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE.format(model=tiny, method="full"))
    Path("odd").mkdir()
    Path("odd/config.json").write_text('{"model_type": "no-such-model"}')
    Path("odd/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    output = backfire("doctor", *arguments)
    assert output.code == 2 and sentence in output.err
    assert output.err.count("\n") == 1 and "Traceback" not in output.err


def test_the_speed_is_that_of_the_recipes_products(
    monkeypatch: pytest.MonkeyPatch, backfire: Run, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    seen = set[torch.dtype]()
    monkeypatch.setattr(products, "linear", lambda x, weight: seen.add(x.dtype))
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(model=tiny, method="full"))
    for compute in ("bfloat16", "float32"):
        assert backfire("doctor", path, f"train.compute={compute}").code == 0
        assert seen == {getattr(torch, compute)}
        seen.clear()
