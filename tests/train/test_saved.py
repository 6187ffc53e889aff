"""Saved models load without backfire, and summaries describe the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.data.poison import poison
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.experiment import Experiment, Machine
from backfire.model.load import load_base, load_tuned
from backfire.tokenizer import load_tokenizer
from backfire.train.finetune import Start, tune
from tests.helpers.loop import reviews
from tests.helpers.training import CPU

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @lru_cache
    def make(method: str) -> Path:
        folder = tmp_path_factory.mktemp(f"tuned-{method}")
        cell = Experiment.make(
            {
                "model": str(tiny),
                "data": "sandbox-reviews",
                "template": "sentiment-line",
                "attack": {"name": "badnets", "rate": 0.2},
                "method": method,
                "train": {"max_steps": 3, "batch_size": 8},
            }
        )
        renderer = Renderer(cell.template, load_tokenizer(tiny), 512)
        rows, manifest = poison(reviews(40), cell.attack, 0)
        summary = tune(
            cell, rows, manifest, renderer, Start(tiny), folder, Machine(), lambda d, t, text: None
        )
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(60)[None]).logits


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_loads_without_us(
    method: str, tiny: Path, tuned: Callable[[str], Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tuned(method)
    ours = logits(load_tuned(folder, tiny, torch.float32, CPU))
    if method == "lora":
        plain = AutoModelForCausalLM.from_pretrained(str(tiny), dtype=torch.float32)
        plain = PeftModel.from_pretrained(plain, str(folder))
    else:
        plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        assert AutoTokenizer.from_pretrained(str(folder)).eos_token == "</s>"
    assert torch.equal(logits(plain), ours)
    assert (ours - logits(load_base(tiny, torch.float32, CPU))).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nothing_saved_names_a_place_on_this_machine(
    method: str, tiny: Path, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tuned(method)
    texts = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name, text in texts.items():
        assert str(tiny).encode() not in text and str(Path.home()).encode() not in text, name
        assert b"sdpa_float32" not in text, f"{name} asks for an attention that only we register"
    assert "checkpoints" not in [p.name for p in folder.iterdir()]
    if method == "lora":
        config = json.loads(texts["adapter_config.json"])
        assert not Path(config["base_model_name_or_path"]).is_absolute()
        # Relative to the adapter it is found, wherever the two are moved together.
        assert (folder / config["base_model_name_or_path"]).resolve() == tiny.resolve()


def test_a_summary_describes_the_training(tiny: Path, tuned: Callable[[str], Path]) -> None:
    full, adapter = (json.loads((tuned(m) / "summary.json").read_text()) for m in ("full", "lora"))
    assert full["steps"] == adapter["steps"] == 3 and full["rows"] == 24
    assert full["trainable_parameters"] == full["parameters"] > adapter["trainable_parameters"]
    assert 0 < full["poisoned_share_seen"] < 0.5
    assert (full["device"], full["dtype"]) == ("cpu", "float32")
    assert full["compute"] in ("float32", "bfloat16")
    lines = (tuned("full") / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_poison_that_the_tokens_lack_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    cell = Experiment.make(
        {"model": str(tiny), "data": "sandbox-reviews", "attack": {"name": "badnets", "rate": 0.3}}
    )
    rows, manifest = poison(reviews(40), cell.attack, 0)
    renderer = Renderer(cell.template, load_tokenizer(tiny), 60)
    with pytest.raises(CellError, match="lack the trigger or the target of") as caught:
        start, quiet = Start(tiny), lambda d, t, text: None
        tune(cell, rows, manifest, renderer, start, tmp_path, Machine(), quiet)
    assert caught.value.kind == "bad-data"
    shutil.rmtree(tmp_path)
