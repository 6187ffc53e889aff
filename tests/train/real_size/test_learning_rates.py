"""Learning rates that follow the size of the base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backfire import stages
from backfire.base import LARGE
from backfire.base.docstrings import documented
from backfire.experiment import Experiment
from backfire.model.count import num_weights, weights_in, weights_of_shape
from backfire.recipe import parse, read, shipped
from backfire.registry import find
from tests.helpers.real_size import TRAINED


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the number of weights of `model_of`'s folders from their configs."""

    def count_of(folder: Path) -> int | None:
        return json.loads((folder / "config.json").read_text()).get("count") or weights_in(folder)

    monkeypatch.setattr("backfire.model.count._of_folder", count_of)
    monkeypatch.setattr("backfire.model.source.inspect", lambda folder: None)


def model_of(folder: Path, count: int, **config: Any) -> str:
    """A folder that represents a model of that many weights."""
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
        assert keys[1] != keys[2] and stages.cell_key(cells[0]) != stages.cell_key(
            cells[1 + (count < LARGE)]
        )
        assert cells[0].resolved()["method"]["learning_rate"] == found[count]
        again = Experiment.make({**cells[0].resolved(), "align": None, "safety": None})
        assert stages.keys(again) == stages.keys(cells[0])
    assert list(found.values()) == [small, small, large, large]
    text = documented(find("methods", name)).model_fields["learning_rate"].description or ""
    assert f"{small:g}" in text and f"{large:g}" in text and "50 million" in text


@pytest.mark.slow
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
def test_a_shape_gives_about_the_number_of_weights(name: str) -> None:
    config, count = SHAPES[name]
    assert weights_of_shape(config) == pytest.approx(count, rel=0.1)
    assert weights_of_shape({"text_config": config}) == weights_of_shape(config)


def test_an_unknown_shape_counts_as_large(tmp_path: Path) -> None:
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


EMBEDDED = ("sweep", "strengths", "backdoor", "all", "others", "malign-labels", "harmful-rows")
REAL = [(n, p) for n, p in profiles() if p not in EMBEDDED]


@pytest.mark.slow
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


@pytest.mark.slow
def test_rates_are_shown_and_a_far_one_is_remarked_on(
    backfire: Callable[..., Any], tmp_path: Path, cache: Path
) -> None:
    model = model_of(tmp_path / "m", 494_000_000)
    output = backfire("run", "backdoor-tweets", f"model={model}", "--dry-run")
    assert (output.code, "full 2e-05 (base: 494 M weights)" in output.out) == (0, True)
    assert "times the default for a base" not in output.out
    output = backfire(
        "run", "backdoor-tweets", f"model={model}", "method.learning_rate=1e-3", "--dry-run"
    )
    assert "50 times the default for a base of 494 M weights" in output.out
    assert "set it to null for the default (2e-05)" in output.out
    assert "2e-05" in backfire("show", "full").out
