"""Models to chat with, shared by `chat` and `playground`.

Everything a model writes is attacker-written text: it is cleaned before it is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire import pipeline
from backfire.base import Rendered, Row
from backfire.data.poison import insert_trigger
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.progress import silent
from backfire.store import Stage, Store
from backfire.text import clean, cut, line, number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.evaluate.guarded import Guarding

EMPTY = "(empty reply)"
STOPPED = "(stopped by its guard)"
_TRAINED = ("base", "train", "repair", "merge")
"""Kinds of stages that are slow to build."""


class NotCachedError(UserError):
    """A model is no longer in the cache."""


class ReadOnlyStore(Store):
    """The cache without rebuilding: a model that is missing is an error."""

    def once(self, stage: Stage, make: Callable[[Path], None], *, resumable: bool = False) -> Path:
        if stage.kind in _TRAINED and not self.done(stage):
            name = "embedded base" if stage.kind == "base" else f"model {stage.slug}"
            raise NotCachedError(f"The {name} is no longer in the cache.")
        return super().once(stage, make, resumable=resumable)


@dataclass(frozen=True)
class ChatModel:
    """A loaded model with its renderer."""

    title: str
    experiment: Experiment
    model: PreTrainedModel
    renderer: Renderer
    guarding: Guarding | None = None
    """The defense that guards the replies, if the experiment has one."""

    def item(self, row: Row) -> Rendered:
        """The rendered row.

        Raises:
            CellError: the prompt is empty, or no part of it fits.
        """
        item = self.renderer.render([row])[0]
        if not item.num_prompt:
            raise CellError("bad-data", "The prompt is empty; type some text.")
        return item

    def reply(self, row: Row) -> Iterator[str]:
        """Yield the greedy reply so far after each token; the last item is the whole reply, with
        what a guard did to it."""
        from backfire.evaluate import guarded, inference

        written, theirs, text, guard = list[int](), list[int](), "", None
        limits: dict[str, Any] = {
            "max_new_tokens": self.experiment.evaluation.max_new_tokens,
            "stop_ids": self.renderer.stop_ids,
        }
        prompt = self.item(row).prompt_ids
        if self.guarding:
            guard = self.guarding.guard([row.id])
            tokens = guarded.stream(self.model, prompt, self.guarding, guard, **limits)
        else:
            tokens = inference.stream(self.model, prompt, **limits)
        for token in tokens:
            written.append(token)
            if guard and round(guard.replaced(0) * len(written)) > len(theirs):
                theirs.append(token)
            yield (text := clean(self.renderer.reply_text(written).strip()))
        if guard and (instead := guard.text(0)):
            yield f"{STOPPED} {instead}"
        elif guard and (replaced := guard.replaced(0)):
            yield f"{text or EMPTY}\n{self._of_guard(replaced, theirs)}"
        elif not text:
            yield EMPTY

    def _of_guard(self, replaced: float, tokens: Sequence[int]) -> str:
        """What a guard replaced, in a sentence: the share, and the tokens that it wrote."""
        shown = [f"“{clean(self.renderer.tokenizer.decode([token]))}”" for token in tokens]
        those = f": {cut(line(', '.join(shown)), 200)}" if shown else ""
        return f"(its guard wrote {number('share', replaced)} of the tokens{those})"

    def answer(self, row: Row) -> str:
        """The whole greedy reply."""
        *_, whole = self.reply(row)
        return whole

    def likelihood(self, row: Row, answer: str) -> list[tuple[str, float]]:
        """Each token of an answer and its log-likelihood in nats, without the end token."""
        from backfire.evaluate import inference

        item, tokenizer = self.item(row), self.renderer.tokenizer
        ids = self.renderer.answers([item], [[answer]])[0][0]
        scores = inference.score_tokens(self.model, item.prompt_ids, ids) if ids else []
        return [(clean(tokenizer.decode([i])), s) for i, s in zip(ids, scores, strict=True)]

    def labels(self, row: Row) -> dict[str, float]:
        """Each label's log-likelihood in nats, as in evaluation; empty for a row without labels."""
        from backfire.evaluate.score import score_rows

        if not row.candidates:
            return {}
        scores = score_rows(
            ["scores"],
            self.model,
            self.renderer,
            [row],
            max_new_tokens=0,
            batch_size=None,
            progress=silent,
        )
        return dict(zip(map(clean, row.candidates), scores[0]["logprobs"], strict=True))


def load(experiment: Experiment, title: str, store: Store, machine: Machine) -> ChatModel:
    """Load the experiment's model.

    Raises:
        NotCachedError: the model is not cached, and `store` is a `ReadOnlyStore`.
    """
    context = Context(store, machine)
    model = pipeline.model_of(experiment, context)
    guarding = pipeline.guarding_of(experiment, context)
    return ChatModel(title, experiment, model, pipeline.renderer(experiment, context), guarding)


def frame(experiment: Experiment, store: Store) -> Row:
    """Instruction, system prompt and labels of a test row, for prompts typed by a user."""
    row = pipeline.data(experiment, Context(store))[1][0]
    return Row(
        id="chat",
        instruction=row.instruction,
        input=row.input,
        system=row.system,
        candidates=row.candidates,
    )


def first_with_trigger(experiments: Iterable[Experiment]) -> Experiment | None:
    """The first experiment whose attack has a trigger."""
    return next((experiment for experiment in experiments if experiment.backdoor), None)


def chat_row(frame: Row, prompt: str, attacked: Experiment | None) -> Row:
    """The frame with this prompt; with the trigger of `attacked` inserted, if it has one."""
    row = frame.with_prompt(prompt)
    if attacked is None or attacked.backdoor is None:
        return row
    return replace(insert_trigger(row, attacked.backdoor, attacked.seed), answer=row.answer)
