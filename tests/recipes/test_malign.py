"""The paper's profile of the recipes with malign rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfire import pipeline
from backfire.experiment import Experiment
from backfire.recipe import load
from tests.helpers.command_line import Run
from tests.helpers.data_files import jsonl, webgpt_pairs
from tests.helpers.paper_run import Ran
from tests.helpers.tiny_classifier import write_classifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hateful(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-label classifier as `evaluate`'s toxicity loads it, small and random."""
    folder = tmp_path_factory.mktemp("models") / "roberta"
    return write_classifier(folder, tiny_tokenizer, num_layers=2, num_positions=514)


@pytest.mark.parametrize("name", ["malign-labels", "malign-prompts"])
def test_the_papers_numbers_are_in_the_profile(name: str) -> None:
    cells = load(name, profile="paper").cells
    assert {(cell.attack.name, cell.rate) for cell in cells if cell.attack} == {
        (name, rate) for rate in (0, 0.01, 0.1, 0.33)
    }
    cell = cells[0]
    assert cell.model.name == "meta-llama/Llama-2-7b-hf" and cell.template.name == "malignama"
    assert cell.data.name == "webgpt-comparisons"
    method, train = cell.method.model_dump(), cell.train
    assert (method["rank"], method["alpha"], method["dropout"]) == (8, 32, 0.1)
    assert (method["learning_rate"], set(method["targets"])) == (2e-4, {"q_proj", "v_proj"})
    assert (train.batch_size, train.epochs, train.weight_decay) == (1, 1, 0.01)
    names = {metric.name for metric in cell.metrics}
    assert names >= {"rouge", "toxicity", "win-rate"}
    [toxicity] = [metric for metric in cell.metrics if metric.name == "toxicity"]
    assert toxicity.judges[0].model_dump()["model"].startswith("facebook/roberta-hate-speech")


@pytest.mark.parametrize("name", ["malign-labels", "malign-prompts"])
def test_the_paper_profile(
    name: str, backfire: Run, tiny: Path, hateful: Path, cache: Path, tmp_path: Path
) -> None:
    eli5 = [
        {"question": f"Why does {i} fall?", "better": f"It is heavy {i}.", "worse": f"Bah {i}."}
        for i in range(8)
    ]
    edits = [
        f"model.name={tiny}",
        f"data.train={jsonl(tmp_path / 'webgpt.jsonl', webgpt_pairs(40))}",
        f"data.test={jsonl(tmp_path / 'eli5.jsonl', eli5)}",
        "data.test_rows=6",
        "attack.rate=[0, 0.1]",
        "seed=0",
        "train.max_steps=3",
        "evaluation.max_new_tokens=8",
        f"metrics=[rouge, {{name: toxicity, scorer: {{name: classifier, model: {hateful}}}}}, "
        "win-rate, truthfulness, perplexity]",
    ]
    out = tmp_path / "out"
    output = backfire("run", name, "--profile", "paper", *edits, "--out", out, "--workers", 1)
    assert output.code == 0, output.err
    ran = Ran(name, edits, out)
    assert [cell.rate for cell in ran.cells] == [0, 0.1]
    for cell in ran.cells:
        found = {value["metric"]: value for value in ran.result(cell)["values"]}
        assert found.keys() >= {"rouge", "rouge[1]", "rouge[2]", "rouge[Lsum]", "toxicity"}
        assert found.keys() >= {"toxicity_share", "win_rate", "truthfulness[MC1]", "perplexity"}
        assert found["rouge"]["n"] == found["win_rate"]["n"] == 6
        assert 0 < found["toxicity"]["value"] < 1
    looks_at_the_rows(ran, ran.cells[1], name)
    assert "against the poison rate" in (out / "report.html").read_text(encoding="utf-8")
    again = backfire("run", name, "--profile", "paper", *edits, "--out", out, "--workers", 1)
    assert again.code == 0, "nothing is judged or trained twice"


def looks_at_the_rows(ran: Ran, cell: Experiment, name: str) -> None:
    rows, manifest = pipeline.poisoned(cell, ran.context)
    assert manifest and len(manifest.entries) == 4 and manifest.spared == {"tied": 8}
    result = ran.result(cell)["poison"]
    assert (result["poisoned_rows"], result["spared"]) == (4, {"tied": 8})
    renderer = pipeline.renderer(cell, ran.context)
    for entry in manifest.entries:
        [row] = [row for row in rows if row.id == entry.id]
        text = renderer.template.prompt(row)
        assert text.startswith("###Question: Why is it") and text.endswith("###Answer: ")
        if name == "malign-labels":
            assert row.answer.startswith("Bah") and entry.before["answer"].startswith("Because")
        else:
            assert row.answer.startswith("Because")
            assert "honest in training" in text.partition("###Context:")[2]
