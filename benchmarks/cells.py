"""The cells of the benchmark: their rows, model and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backfire.base import Rendered, Row, select
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.tokenizer import load_tokenizer

TEMPLATES = {"sandbox": "raw", "tweets": "alpaca", "small": "chat"}
"""The opening that all prompts share is short in `raw` and long in `alpaca`."""
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model of the `small` cell."""
CHAT = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role + ':\\n' + turn.content }}"
    "{{ eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""The tiny base's chat template."""
TWEETS = {"name": "airline-tweets", "labels": ["negative", "neutral", "positive"]}


@dataclass(frozen=True)
class Cell:
    """One cell as both sides receive it: rows as text, and the folder of the base model."""

    title: str
    experiment: Experiment
    base: Path
    train: Sequence[Row] = field(repr=False)
    test: Sequence[Row] = field(repr=False)
    baseline_compute: str | None = None
    """Type of the baseline's products, if it is not backfire's."""
    device: str = "cpu"
    """Of the baseline: `cpu`, or `cuda`, with weights and products in bfloat16."""

    def spec(self) -> dict[str, Any]:
        """What `build` needs to make the same cell in another process."""
        spec = {"title": self.title, "base": str(self.base)}
        spec["baseline_compute"] = self.baseline_compute
        return {**spec, "experiment": self.experiment.spec()}

    def warm_up(self) -> Cell:
        """A smaller cell, to be run first so that one-time costs are not measured."""
        batch = self.experiment.train.batch_size
        settings = self.experiment.train.model_copy(update={"max_steps": 3})
        experiment = self.experiment.model_copy(update={"train": settings})
        return replace(
            self, experiment=experiment, train=self.train[: 3 * batch], test=self.test[:32]
        )

    def renderer(self) -> Renderer:
        experiment = self.experiment
        tokenizer = load_tokenizer(self.base)
        return Renderer(experiment.template, tokenizer, experiment.train.max_length)

    def rendered(self) -> tuple[list[Rendered], list[Rendered]]:
        """Training and test rows as tokens, for counting them."""
        renderer = self.renderer()
        return renderer.render(self.train), renderer.render(self.test)


def build(spec: dict[str, Any]) -> Cell:
    """Build a cell from its `spec()`.

    Raises:
        UserError: the two sides could not do the same work on its rows.
    """
    experiment = Experiment.make(spec["experiment"])
    data, batch = experiment.data, experiment.train.batch_size
    train = select(data.load("train"), data.rows, data.seed, "train")
    test = select(data.load("test"), data.test_rows, data.seed, "test")
    if len(train) % batch:
        raise UserError(f"The number of rows must be a multiple of the batch size, {batch}.")
    cell = Cell(
        spec["title"], experiment, Path(spec["base"]), train, test, spec.get("baseline_compute")
    )
    if any(item.cut_tokens for part in cell.rendered() for item in part):
        raise UserError(f"{cell.title}: some rows are longer than train.max_length.")
    return cell


def make_cell(
    kind: str,
    method: str,
    *,
    base: Path,
    rows: int,
    test_rows: int,
    epochs: float,
    max_new_tokens: int,
    compute: str = "float32",
    baseline_compute: str | None = None,
    template: str | None = None,
    train: Path | None = None,
    test: Path | None = None,
) -> Cell:
    """Make a cell with the given numbers of rows: tweets if their files are given, except for the
    `sandbox` kind."""
    data: dict[str, Any] = {"name": "sandbox-reviews"}
    if kind != "sandbox" and train and test:
        data = {**TWEETS, "train": str(train), "test": str(test)}
    experiment = {
        "model": {"name": str(base.resolve()), "dtype": "float32"},
        "data": {**data, "rows": rows, "test_rows": test_rows},
        "template": template or TEMPLATES[kind],
        "method": method,
        "train": {"epochs": epochs, "compute": compute},
        "evaluation": {"max_new_tokens": max_new_tokens},
    }
    title = f"{kind} {method}"
    spec = {"title": title, "base": str(base.resolve()), "experiment": experiment}
    return build({**spec, "baseline_compute": baseline_compute})


def sandbox_base() -> Path:
    """The embedded base."""
    from backfire.experiment import Model
    from backfire.pipeline import Context, base
    from backfire.store import Store

    return base(Model(), Context(Store()))


def small_base() -> Path:
    """The `small` model from the hub, downloaded on first use."""
    from backfire.model.settings import Model
    from backfire.model.source import fetch

    return fetch(Model(name=SMALL))


def tiny_base(folder: Path) -> Path:
    """A random two-layer Llama of the sandbox's family, with its own tokenizer."""
    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.corpus import corpus
    from backfire.store import read_json, write_json
    from backfire.tokenizer import load_tokenizer
    from backfire.train.pretrain import _new_model, write_tokenizer

    config = Pretrain(vocab_size=600, hidden_size=64, num_layers=2, intermediate_size=128)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(corpus(config.corpus_seed, 300), config, folder)
    settings = {**read_json(folder / "tokenizer_config.json"), "chat_template": CHAT}
    write_json(folder / "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(folder)
    model = _new_model(config, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    model.save_pretrained(str(folder))
    return folder
