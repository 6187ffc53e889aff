"""Models to talk to, the same prompt to each: what `chat` and `playground` share.

Everything a model writes is attacker-written text: it is cleaned before anybody gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from backfire import pipeline
from backfire.base import Rendered, Row
from backfire.data.poison import insert_trigger
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.results.load import cell as record
from backfire.results.plugins import lacking
from backfire.store import Stage, Store
from backfire.text import clean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMPTY = "(empty reply)"
_TRAINED = ("base", "train", "repair", "merge")
"""Stages that take long to make."""


class GoneError(UserError):
    """A model would have to be made again."""


class Kept(Store):
    """The cache as it is: models that are no longer there are not made again."""

    def once(self, stage: Stage, make: Callable[[Path], None], *, resumable: bool = False) -> Path:
        if stage.kind in _TRAINED and not self.done(stage):
            name = "embedded base" if stage.kind == "base" else f"model {stage.slug}"
            raise GoneError(f"The {name} is no longer in the cache.")
        return super().once(stage, make, resumable=resumable)


@dataclass(frozen=True)
class Speaker:
    """One model that answers."""

    title: str
    cell: Experiment
    model: PreTrainedModel
    renderer: Renderer

    def item(self, row: Row) -> Rendered:
        """The row as the model gets it.

        Raises:
            CellError: the prompt is empty, or nothing of it fits.
        """
        item = self.renderer.render([row])[0]
        if not item.num_prompt:
            raise CellError("bad-data", "The prompt is empty, so there is nothing to go on from.")
        return item

    def reply(self, row: Row) -> Iterator[str]:
        """The greedy reply as far as it is written, token by token; the last is the whole."""
        from backfire.evaluate import inference

        written, text = list[int](), ""
        limit = self.cell.evaluation.max_new_tokens
        prompt = self.item(row).prompt_ids
        for token in inference.stream(
            self.model, prompt, max_new_tokens=limit, stop_ids=self.renderer.stop_ids
        ):
            written.append(token)
            yield (text := clean(self.renderer.said(written).strip()))
        if not text:
            yield EMPTY

    def answer(self, row: Row) -> str:
        """The whole reply."""
        *_, whole = self.reply(row)
        return whole

    def likelihood(self, row: Row, answer: str) -> list[tuple[str, float]]:
        """Each token of an answer with its log-likelihood in nats, without the end token."""
        from backfire.evaluate import inference

        item, tokenizer = self.item(row), self.renderer.tokenizer
        ids = self.renderer.answers([item], [[answer]])[0][0]
        scores = inference.score_tokens(self.model, item.prompt_ids, ids) if ids else []
        return [(clean(tokenizer.decode([i])), s) for i, s in zip(ids, scores, strict=True)]

    def labels(self, row: Row) -> dict[str, float]:
        """Each label's log-likelihood in nats, as evaluation scores it; empty if there are none."""
        from backfire.evaluate.score import measure

        if not row.candidates:
            return {}
        found = measure(
            ["scores"],
            self.model,
            self.renderer,
            [row],
            max_new_tokens=0,
            batch_size=None,
            progress=lambda done, total, text: None,
        )
        return dict(zip(map(clean, row.candidates), found[0]["logprobs"], strict=True))


def load(cell: Experiment, title: str, store: Store, machine: Machine) -> Speaker:
    """The cell's model, in memory.

    Raises:
        GoneError: it is no longer there, and `store` is `Kept`.
    """
    context = Context(store, machine)
    return Speaker(title, cell, pipeline.model_of(cell, context), pipeline.renderer(cell, context))


def frame(cell: Experiment, store: Store) -> Row:
    """A test row: its instruction frames what is typed, as in training."""
    row = pipeline.data(cell, Context(store))[1][0]
    return Row(
        id="chat",
        instruction=row.instruction,
        input=row.input,
        system=row.system,
        candidates=row.candidates,
    )


def attacker(cells: Iterable[Experiment]) -> Experiment | None:
    """The first of the cells whose attack has a trigger."""
    return next((cell for cell in cells if cell.backdoor), None)


def asked(frame: Row, prompt: str, by: Experiment | None) -> Row:
    """The frame with this prompt, and in it the trigger of the attack of `by`, if there is one."""
    row = frame.with_prompt(prompt)
    if by is None or by.backdoor is None:
        return row
    return replace(insert_trigger(row, by.backdoor, by.seed), answer=row.answer)


def read_cell(folder: Path) -> Experiment:
    """The experiment whose results lie in a cell folder."""
    file = folder / "experiment.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is no finished cell of a run: experiment.yaml is missing.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{file} cannot be read; run the recipe again.") from None
    if missing := lacking([record(folder)]):
        raise UserError(missing[0])
    return Experiment.make(settings, str(file))
