"""A reference model that is asked about rows, for scanners that need one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from backfire.base import NOTHING, Finding, Measure, Measured, ModelScanner, Rendered, Row
from backfire.base.normalize import words
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.evaluate import inference
from backfire.evaluate.effort import PROBED, REPLY, WORDS, tokens_read
from backfire.evaluate.features import features
from backfire.model.load import with_adapters
from backfire.model.resident import Resident, Source
from backfire.tokenizer import Tokenizer
from backfire.train.batches import Span
from backfire.train.probe import probe

Array = Any
_PROMPT = 256
"""Tokens of a prompt whose words are measured."""
_TIMED = 8  # rows


@dataclass(frozen=True)
class Reference:
    """A model and how it reads rows. It is loaded for one call of `measure` at a time."""

    source: Source
    renderer: Renderer
    num_weights: int | None = None
    """Decides the learning rate of the probe."""
    adapter: Path | None = None
    resident: Resident = field(default_factory=Resident)
    tell: Callable[[int, int, float], None] = lambda rows, cut, seconds: None
    """Called before the work starts, with the number of rows that are read, that of those whose
    prompt is cut, and the estimated seconds."""

    def measure(self, rows: Sequence[Row], *scanners: ModelScanner) -> tuple[list[int], Measured]:
        """Places of the rows that the model can read, and what it says of them, as far as these
        scanners need it. Left out are rows without a prompt or an answer, too long ones, and those
        that the template refuses.

        Raises:
            UserError: the model cannot be loaded.
            CellError: memory runs out, or the probe fails.
        """
        wanted = {need for scanner in scanners for need in scanner.needs}
        readable = self._readable(rows)
        kept, items = [place for place, _ in readable], [item for _, item in readable]
        if not items:
            return [], Measured()
        attach = partial(with_adapters, adapter=None, below=self.adapter)
        with self.resident.attached(self.source, attach) as model:
            seconds = self._seconds(model, items, wanted)
            self.tell(len(items), sum(item.cut_tokens > 0 for item in items), seconds)
            found = self._before(model, items, wanted)
            if wanted & PROBED:
                tuned = probe(model, items, self.num_weights)
                found = _after(tuned, items, wanted, found)
        return kept, found

    def _readable(self, rows: Sequence[Row]) -> list[tuple[int, Rendered]]:
        """The rendered rows that can be measured, each with its place."""
        by_place: list[tuple[int, Rendered]] = []
        try:
            items, left = self.renderer.sift(rows)
            gone = set(map(id, left))
            places = [place for place, row in enumerate(rows) if id(row) not in gone]
            by_place = list(zip(places, items, strict=True))
        except (UserError, CellError):  # of some rows; which ones is found one by one
            for place, row in enumerate(rows):
                try:
                    by_place += [(place, item) for item in self.renderer.sift([row])[0]]
                except (UserError, CellError):
                    continue
        return [
            (n, item)
            for n, item in by_place
            if item.num_prompt and rows[n].conversation.strip() and item.row.answer.strip()
        ]

    def _before(
        self, model: PreTrainedModel, items: Sequence[Rendered], wanted: set[Measure]
    ) -> Measured:
        found = Measured()
        if "replies" in wanted:
            readings = inference.read(
                model,
                [item.prompt_ids for item in items],
                max_new_tokens=REPLY,
                stop_ids=self.renderer.stop_ids,
            )
            replies = [self.renderer.reply_text(reading.reply) for reading in readings]
            found = replace(found, replies=replies)
        if wanted & {"losses", "tuned"}:
            found = replace(found, losses=_losses(model, items))
        if "words" in wanted:
            asked = word_drops(model, self.renderer.tokenizer, [item.row for item in items])
            found = replace(found, words=asked)
        return found

    def _seconds(
        self, model: PreTrainedModel, items: Sequence[Rendered], wanted: set[Measure]
    ) -> float:
        """Estimated seconds, from a pass over a few rows."""
        some = items[:: max(1, len(items) // _TIMED)][:_TIMED]
        inference.score_answers(model, some[:1])  # the first pass sets things up
        begun = time.perf_counter()
        inference.score_answers(model, some)
        each = (time.perf_counter() - begun) / sum(len(item.ids) for item in some)
        total = sum(len(item.ids) for item in items)
        prompts = sum(item.num_prompt for item in items)
        return each * tokens_read(wanted, len(items), prompts, total)


def _losses(model: PreTrainedModel, items: Sequence[Rendered]) -> Array:
    totals = np.array(inference.score_answers(model, items))
    return -totals / np.array([max(item.num_supervised, 1) for item in items])


def _after(
    model: PreTrainedModel, items: Sequence[Rendered], wanted: set[Measure], found: Measured
) -> Measured:
    if "tuned" in wanted:
        found = replace(found, tuned=_losses(model, items))
    if wanted & {"states", "gradients"}:
        states, gradients = features(model, items)
        found = replace(found, states=states, gradients=gradients)
    return found


def look(scanner: ModelScanner, rows: Sequence[Row], reference: Reference) -> list[Finding]:
    """The findings of a scanner, one for each row; in rows that the model cannot read, nothing."""
    kept, measured = reference.measure(rows, scanner)
    out = [NOTHING] * len(rows)
    for place, one in zip(kept, scanner.look([rows[n] for n in kept], measured), strict=True):
        out[place] = one
    return out


# ------------------------------------------------------------------------- words of a prompt


def word_drops(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[Row]
) -> list[list[tuple[str, float]]]:
    """`Measured.words` of each row: by how much the mean negative log-likelihood of the prompt's
    tokens falls when a word is removed, of the words with the least likely tokens.

    The prompt is the last user turn as plain text, without an instruction that all rows share.
    """
    shared = len({row.instruction for row in rows}) == 1
    texts = [row.input if shared and row.input else row.messages[-1].content for row in rows]
    lead = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    whole = [_Prompt.of(text, lead, tokenizer) for text in texts]
    scores = inference.score_each(model, [one.span for one in whole])
    tries = [one.surprising(each.numpy()) for one, each in zip(whole, scores, strict=True)]
    less = [
        [*(_without(one.text, start, end, lead, tokenizer) for _, start, end in chosen)]
        for one, chosen in zip(whole, tries, strict=True)
    ]
    spans = [Span([lead, *ids], 1, len(ids) + 1) for each in less for ids in each]
    rest = iter(inference.score_each(model, spans))
    return [
        [
            (word, _mean(-own) - _mean(-next(rest)))
            for (word, _, _), _ in zip(chosen, each, strict=True)
        ]
        for own, chosen, each in zip(scores, tries, less, strict=True)
    ]


def _mean(losses: Any) -> float:
    return float(losses.mean()) if len(losses) else 0.0


def _without(text: str, start: int, end: int, lead: int, tokenizer: Tokenizer) -> list[int]:
    """Ids of the text without a word."""
    return tokenizer.encode(without(text, start, end))[:_PROMPT]


def without(text: str, start: int, end: int) -> str:
    """The text without the word at these places; white space before it goes too, unless there is
    some behind it as well."""
    before, after = text[:start], text[end:]
    if before[-1:].isspace():
        before = before.rstrip() + " " * after[:1].isspace()
        after = after.lstrip()
    return f"{before}{after}".strip()


@dataclass(frozen=True)
class _Prompt:
    text: str
    span: Span
    ends: list[int]
    """Where each token ends in the text."""

    @classmethod
    def of(cls, text: str, lead: int, tokenizer: Tokenizer) -> _Prompt:
        tokenizer.backend.encode_special_tokens = True
        encoded = tokenizer.backend.encode(text, add_special_tokens=False)
        ids = [lead, *encoded.ids[:_PROMPT]]
        ends = [end for _, end in encoded.offsets[:_PROMPT]]
        return cls(text, Span(ids, 1, len(ids)), ends)

    def surprising(self, scores: Array) -> list[tuple[str, int, int]]:
        """The words whose tokens are least likely together, each with its place."""
        found: list[tuple[str, int, int]] = []
        place = 0
        for word in words(self.text):
            start = self.text.index(word, place)
            place = start + len(word)
            found.append((word, start, place))
        losses = [0.0] * len(found)
        number = 0
        for end, score in zip(self.ends, scores, strict=True):
            while number < len(found) and found[number][2] < end:
                number += 1
            if number < len(found) and end > found[number][1]:
                losses[number] -= float(score)
        best = sorted(range(len(found)), key=lambda n: (-losses[n], n))[:WORDS]
        return [found[n] for n in sorted(best) if losses[n] > 0] if len(found) > 1 else []
