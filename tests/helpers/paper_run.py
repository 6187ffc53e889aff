"""A finished run of a recipe's `paper` profile, and what is checked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from backfire import pipeline, stages
from backfire.base import Rendered
from backfire.experiment import Experiment
from backfire.recipe import load
from backfire.store import Store, read_json
from tests.helpers.command_line import Run

BOS, EOS = 1, 2
SMALL = ["train.max_steps=3", "train.batch_size=4", "seed=0"]


class Ran:
    """A finished run, with its cells."""

    def __init__(self, name: str, edits: list[str], out: Path, profile: str = "paper") -> None:
        self.cells = load(name, profile=profile, edits=edits).cells
        self.out, self.context = out, pipeline.Context(Store())

    def result(self, cell: Experiment) -> Any:
        return read_json(
            self.out / "cells" / f"{cell.slug}-{stages.cell_key(cell)}" / "result.json"
        )

    def adapter(self, cell: Experiment) -> Path:
        run = cell if cell.poisons else cell.clean_twin()
        return self.context.store.path(stages.train(run))

    def rendered(self, cell: Experiment) -> list[Rendered]:
        return pipeline.renderer(cell, self.context).render(
            pipeline.poisoned(cell, self.context)[0]
        )


def check(ran: Ran, model: Path) -> None:
    """Results, tokens, bits, and adapters that load without us, of every cell of a run."""
    for cell in ran.cells:
        result = ran.result(cell)
        assert result["values"] and not [c for c in result["preflight"] if c["status"] == "fail"]
        items = ran.rendered(cell)
        for item in items:
            assert (item.ids[0], item.ids[-1]) == (BOS, EOS)
            assert item.ids.count(BOS) == item.ids.count(EOS) == 1
            assert item.num_prompt < len(item.ids), "the end token is learned"
        if not cell.method.trains:
            continue
        train = result["train"]
        answers = {len(item.answer_ids) for item in items}
        assert train["steps"] == 3 and train["rows"] <= 12
        low, high = (train["rows"] * f(answers) for f in (min, max))
        assert low <= train["supervised_tokens"] <= high
        bits = cell.method.quantization("cpu")
        assert train["quantized_layers"] == (14 if bits else 0)
        assert 0 < train["trainable_share"] < 0.05
        loads_without_us(ran.adapter(cell), model)


def loads_without_us(adapter: Path, model: Path) -> None:
    """By plain transformers and PEFT, and it is no no-op."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    ids = torch.tensor([[BOS, 450, 16853, 338]])
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
        after = tuned(input_ids=ids).logits
    assert after.isfinite().all() and not torch.equal(before, after)
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"]


def go(
    backfire: Run, out: Path, name: str, model: Path, files: tuple[Path, Path], *edits: str
) -> Ran:
    train, test = files
    small = [f"model.name={model}", f"data.train={train}", f"data.test={test}", *SMALL, *edits]
    output = backfire("run", name, "--profile", "paper", *small, "--out", out, "--workers", 1)
    assert output.code == 0, output.err
    assert (out / "report.html").is_file()
    return Ran(name, small, out)
