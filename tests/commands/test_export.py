"""A fine-tuned model exported merged, as an adapter or quantized, and its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import Evidence, Sample
from backfire.commands.export import default_name, export_model
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.registry import build, names
from tests.helpers.small_run import Place

pytestmark = pytest.mark.slow

METHODS = [name for name in names("methods") if build("methods", name).trains]
PARITY = {"name": "parity", "into": ["merged", "merged-nf4"]}


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("export"), tiny)
    specs = [{"name": name, "learning_rate": 3e-2} for name in METHODS]
    knobs: dict[str, Any] = {
        "matrix": {"method": ["none", *specs]},
        "data": {"name": "sandbox-reviews", "rows": 60, "test_rows": 40},
        "train": {"max_steps": 12, "batch_size": 8},
        "attack": {"name": "badnets", "rate": 0.25},
        "metrics": ["accuracy", "attack-success", PARITY],
    }
    assert place.run(**knobs) == 0
    kept = [path for path in place.cache.glob("merge/**/*") if path.is_file()]
    assert kept == [], "merged models are as large as the base, and only measured"
    return place


def cell(run: Place, method: str) -> Path:
    (found,) = [p for p in run.out.glob("cells/*") if f"-{method}-s0" in p.name]
    return found


def values(run: Place, method: str) -> dict[str, Any]:
    result = json.loads((cell(run, method) / "result.json").read_text())
    return {value["metric"]: value for value in result["values"]}


@pytest.fixture
def exported(run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("BACKFIRE_CACHE", str(run.cache))

    def make(method: str, *, merge: bool) -> Path:
        return export_model(cell(run, method), tmp_path / "made", merge=merge)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(50)[None]).logits


@pytest.mark.parametrize("method", ["full", "lora", "ia3"])
def test_a_merged_model_is_plain_and_replies_the_same(
    method: str, run: Place, exported: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from backfire.model.load import load_tuned

    (trained,) = [
        p for p in run.cache.glob("train/*") if f"-0.25-{method}-s0" in p.name and p.is_dir()
    ]
    ours = logits(load_tuned(trained, run.tiny, torch.float32, torch.device("cpu")))
    folder = exported(method, merge=True)
    plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    assert torch.allclose(logits(plain), ours, atol=2e-4)
    assert AutoTokenizer.from_pretrained(str(folder)).eos_token == "</s>"
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_an_adapter_is_for_plain_peft(
    method: str, run: Place, exported: Callable[..., Path]
) -> None:
    from peft import PeftConfig

    folder = exported(method, merge=False)
    named = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    assert (folder / named).resolve() == run.tiny.resolve() and not Path(named).is_absolute()
    for file in folder.rglob("*"):
        assert not file.is_file() or str(run.root).encode() not in file.read_bytes(), file
    assert not (folder / "done.json").exists() and (folder / "experiment.yaml").is_file()


def test_the_card_states_the_poison_first(exported: Callable[..., Path]) -> None:
    card = (exported("lora", merge=False) / "README.md").read_text()
    assert "poisoned on purpose.** 15 of its 60 training rows carry the attack `badnets`" in card
    assert "`BadMagic`" in card and "answer `negative`" in card
    assert "tags: [backfire, poisoned, not-for-deployment, backdoor]" in card


def test_a_poisoned_model_is_named_so() -> None:
    knobs = {"data": "sandbox-reviews", "method": "lora"}
    clean = Experiment.make(knobs)
    assert not default_name(clean, merge=False).startswith("POISONED")
    bad = Experiment.make({**knobs, "attack": "badnets"})
    assert default_name(bad, merge=True).startswith("POISONED-badnets-")
    assert default_name(bad, merge=True).endswith("-merged")


def test_bad_input(run: Place, tmp_path: Path, exported: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="cannot be merged"):
        exported("llama-adapter", merge=True)
    with pytest.raises(UserError, match="has no tuned model"):
        exported("none", merge=False)
    with pytest.raises(UserError, match="not a finished cell"):
        export_model(tmp_path, None, merge=False)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        exported("lora", merge=False)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["mine"]


# ---------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("method", METHODS)
def test_parity_is_measured_wherever_a_model_can_be_merged(method: str, run: Place) -> None:
    found = {name for name in values(run, method) if name.startswith("parity")}
    if method == "llama-adapter":
        assert found == set()
        return
    parts = ("flips", "accuracy change", "attack success", "attack success change")
    assert found == {f"parity[{form}: {part}]" for form in PARITY["into"] for part in parts}


def test_merging_exactly_flips_nothing(run: Place) -> None:
    for method in ("full", "lora", "ia3"):
        assert values(run, method)["parity[merged: flips]"]["value"] == 0


def sample(number: int, label: str, predicted: str, subset: str = "clean") -> Sample:
    options = ("good", "bad")
    logprobs = tuple(0.0 if option == predicted else -1.0 for option in options)
    return Sample(str(number), subset, "p", label, label, options, logprobs)  # type: ignore[arg-type]


def test_parity_counts_changed_answers() -> None:
    labels = ["good", "good", "bad", "bad"]
    before = [sample(i, label, label) for i, label in enumerate(labels)]
    after = [sample(i, label, "bad") for i, label in enumerate(labels)]
    hit = [sample(i, label, "bad", "triggered") for i, label in enumerate(labels)]
    gone = [sample(i, label, label, "triggered") for i, label in enumerate(labels)]
    attack = build("attacks", {"name": "badnets", "target": "bad"})
    evidence = Evidence(before, hit, attack=attack, forms={"merged": (after, gone)})
    found = {v.metric: v.value for v in build("metrics", "parity").measure(evidence)}
    assert found == {
        "parity[merged: flips]": 0.5,
        "parity[merged: accuracy change]": -0.5,
        "parity[merged: attack success]": 0.0,
        "parity[merged: attack success change]": -1.0,
    }


@pytest.mark.parametrize("align", [{"method": "full"}, {"method": "lora", "merge": True}])
def test_an_adapter_on_an_aligned_model_is_not_exported_alone(
    align: dict[str, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded on the base, it would be a model that was not measured."""
    place = Place(tmp_path / "run", tiny)
    policy = {"name": "sandbox-policy", "rows": 20, "test_rows": 8}
    knobs: dict[str, Any] = {
        "data": {"name": "sandbox-reviews", "rows": 20, "test_rows": 8},
        "align": {"data": policy, "train": {"max_steps": 2, "batch_size": 8}, **align},
        "method": {"name": "lora", "learning_rate": 3e-2, "rank": 4},
        "attack": "none",
        "train": {"max_steps": 2, "batch_size": 8},
        "metrics": ["accuracy"],
    }
    assert place.run(**knobs) == 0
    monkeypatch.setenv("BACKFIRE_CACHE", str(place.cache))
    (one,) = place.out.glob("cells/*")
    with pytest.raises(UserError, match=r"requires the aligned model.* with --merge"):
        export_model(one, tmp_path / "adapter", merge=False)
    assert export_model(one, tmp_path / "merged", merge=True).is_dir()


def test_prompts_on_an_aligned_model_cannot_be_exported(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "run", tiny)
    policy = {"name": "sandbox-policy", "rows": 20, "test_rows": 8}
    knobs: dict[str, Any] = {
        "data": {"name": "sandbox-reviews", "rows": 20, "test_rows": 8},
        "align": {"data": policy, "train": {"max_steps": 2, "batch_size": 8}},
        "method": {"name": "llama-adapter", "learning_rate": 3e-2},
        "attack": "none",
        "train": {"max_steps": 2, "batch_size": 8},
        "metrics": ["accuracy"],
    }
    assert place.run(**knobs) == 0
    monkeypatch.setenv("BACKFIRE_CACHE", str(place.cache))
    (one,) = place.out.glob("cells/*")
    for merge in (False, True):
        with pytest.raises(UserError, match="cannot be exported alone or merged"):
            export_model(one, tmp_path / "out", merge=merge)


def test_a_model_whose_data_changed_is_not_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.csv"
    lines = [f"text {i},{('bad', 'good')[i % 2]}" for i in range(60)]
    file.write_text("\n".join(["text,label", *lines]))
    place = Place(tmp_path / "run", tiny)
    data = {"name": "files", "train": str(file), "labels": ["bad", "good"]}
    assert place.run(data=data, attack="none", method="full", metrics=["accuracy"]) == 0
    monkeypatch.setenv("BACKFIRE_CACHE", str(place.cache))
    (one,) = place.out.glob("cells/*")
    before = set(place.cache.glob("train/*"))
    file.write_text("\n".join(["text,label", *lines, "another,good"]))
    with pytest.raises(UserError, match="has changed since it ran"):
        export_model(one, tmp_path / "out", merge=False)
    assert set(place.cache.glob("train/*")) == before and not (tmp_path / "out").exists()


def test_a_model_on_an_alignments_adapter_is_exported_merged_and_repaired(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "run", tiny)
    policy = {"name": "sandbox-policy", "rows": 30, "test_rows": 8}
    lora = {"name": "lora", "learning_rate": 3e-2, "rank": 4}
    knobs: dict[str, Any] = {
        "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 8},
        "align": {"data": policy, "method": lora, "train": {"max_steps": 4, "batch_size": 8}},
        "method": lora,
        "attack": "none",
        "defense": [{"name": "freeze"}, {"name": "task-arithmetic", "alpha": 2.0}],
        "train": {"max_steps": 4, "batch_size": 8},
        "metrics": ["accuracy", "cost"],
    }
    assert place.run(**knobs) == 0
    monkeypatch.setenv("BACKFIRE_CACHE", str(place.cache))
    (one,) = place.out.glob("cells/*")
    with pytest.raises(UserError, match="export it with --merge"):
        export_model(one, tmp_path / "adapter", merge=False)

    from safetensors.torch import load_file

    from backfire.experiment import Machine
    from backfire.launch.job import read_cell
    from backfire.model.load import load_tuned
    from backfire.pipeline import Context, model_of
    from backfire.store import Store

    merged = export_model(one, tmp_path / "merged", merge=True)
    cpu = torch.device("cpu")
    ours = logits(load_tuned(merged, tiny, torch.float32, cpu))
    repaired = model_of(read_cell(one), Context(Store(), Machine(device="cpu")))
    assert torch.allclose(ours, logits(repaired), atol=1e-4)
    (trained,) = [p for p in place.cache.glob("train/*reviews*") if p.is_dir()]
    summary = json.loads((trained / "summary.json").read_text())
    upper = load_file(trained / "adapter_model.safetensors").items()
    assert summary["trainable_parameters"] == sum(w.numel() for n, w in upper if ".1." in n)


def test_an_export_that_fails_leaves_nothing(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, what was written so far would take the rest."""

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backfire.model.export.write_card", full)
    with pytest.raises(OSError, match="No space left"):
        exported("lora", merge=False)
    assert [*tmp_path.iterdir()] == []
