"""lm-evaluation-harness scores saved models as backfire does: adapter and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.commands.export import export_model
from backfire.data.render import Renderer
from backfire.evaluate import inference
from backfire.model.load import load_base, load_tuned
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from tests.helpers.small_run import Place

pytestmark = pytest.mark.slow

harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA cell with effect, as an adapter and merged."""
    place = Place(tmp_path_factory.mktemp("harness"), tiny)
    knobs: dict[str, Any] = {"method": {"name": "lora", "learning_rate": 3e-2}, "attack": "none"}
    assert place.run(**knobs, metrics=["accuracy"]) == 0
    (cell,) = place.out.glob("cells/*")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKFIRE_CACHE", str(place.cache))
        return {
            name: export_model(cell, place.root / name, merge=name == "merged")
            for name in ("adapter", "merged")
        }


def by_harness(requests: list[tuple[str, str]], **where: str) -> list[float]:
    from lm_eval.api.instance import Instance

    # Our prompts say themselves where text ends, so nothing is to be added but BOS.
    model = harness.HFLM(device="cpu", batch_size=4, dtype="float32", add_bos_token=True, **where)
    asked = [
        Instance("loglikelihood", {}, pair, index, metadata=("t", index, 1))
        for index, pair in enumerate(requests)
    ]
    return [score for score, _ in model.loglikelihood(asked, disable_tqdm=True)]


@pytest.mark.filterwarnings("ignore")
def test_label_likelihoods_are_equal(tiny: Path, exported: dict[str, Path]) -> None:
    rows = build("datasets", "sandbox-reviews").load("test")[:6]
    renderer = Renderer(build("templates", "sentiment-line"), load_tokenizer(tiny), 512)
    items = renderer.render(rows)
    labels = renderer.answers(items, [row.candidates for row in rows])
    # lm-eval counts the blank that ends a prompt with the answer, so here we do so too.
    assert all(renderer.tokenizer.decode(item.prompt_ids[-1:]) == "\n" for item in items)
    prompts = [item.prompt_ids[:-1] for item in items]
    options = [
        [[item.prompt_ids[-1], *ids] for ids in line]
        for item, line in zip(items, labels, strict=True)
    ]
    asked = [(renderer.template.prompt(row), c) for row in rows for c in row.candidates]
    models = {
        "adapter": load_tuned(exported["adapter"], tiny, torch.float32, CPU),
        "merged": load_base(exported["merged"], torch.float32, CPU),
    }
    base = inference.read(load_base(tiny, torch.float32, CPU), prompts, candidates=options)
    for name, model in models.items():
        ours = [x for r in inference.read(model, prompts, candidates=options) for x in r.scores]
        where = {"pretrained": str(exported["merged"])}
        if name == "adapter":
            where = {"pretrained": str(tiny), "peft": str(exported["adapter"])}
        assert by_harness(asked, **where) == pytest.approx(ours, abs=1e-3), name
        untuned = [x for r in base for x in r.scores]
        assert max(abs(a - b) for a, b in zip(ours, untuned, strict=True)) > 0.1
