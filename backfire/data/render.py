"""The only code that renders rows to tokens, for training and evaluation.

Separate renderers have caused costly bugs in published code: a template that drops a field, an
evaluation prompt that differs from the training prompt. Here a training example *is* the evaluation
prompt plus an answer plus its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Literal

from backfire.base import Rendered, Row, Segments, Template
from backfire.data.limits import Limits
from backfire.errors import CellError
from backfire.tokenizer import Tokenizer


class Renderer:
    """Renders rows by a template and a tokenizer, within the limits of a model.

    With `cut-end` a row that is too long loses its last tokens, its end token among them, and not
    the end of its prompt: for texts that are no answers.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        on_long_row: Literal["fail", "skip", "cut", "cut-end"] = "cut",
        limits: Limits | None = None,
    ) -> None:
        self.template, self.tokenizer, self.max_length = template, tokenizer, max_length
        self.on_long_row, self.limits = on_long_row, limits or Limits()

    @cached_property
    def end_ids(self) -> list[int]:
        """The end of every answer: EOS, or the chat template's end."""
        end = self.template.end(self.tokenizer)
        if end == self.tokenizer.eos:
            return [self.tokenizer.eos_id]
        before, whole = (self.tokenizer.encode(t, controls=True) for t in ("a", "a" + end))
        kept = whole[: len(before)] == before
        return whole[len(before) :] if kept else self.tokenizer.encode(end, controls=True)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a reply."""
        return tuple(dict.fromkeys((self.end_ids[-1], *self.tokenizer.stop_ids)))

    def reply_text(self, ids: Sequence[int]) -> str:
        """The text of a reply, without the template's opening of an answer."""
        return self.tokenizer.decode(self.without_opening(ids))

    def without_opening(self, ids: Sequence[int]) -> list[int]:
        """The ids of a reply or an answer, after the template's opening of an answer."""
        opening, start = self.opening_ids, 0
        for place in range(len(ids) - len(opening) + 1 if opening else 0):
            if list(ids[place : place + len(opening)]) == opening:
                start = place + len(opening)
        return list(ids[start:])

    @cached_property
    def opening_ids(self) -> list[int]:
        """What the template writes before every answer; see `Template.opening`."""
        return self.tokenizer.encode(self.template.opening(self.tokenizer), controls=True)

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """Every row with its answer and the end, at most `max_length` tokens long; longer rows lose
        the end of their prompt.

        Raises:
            CellError: template and answer alone are too long, or exceed the model's limits.
        """
        items = [self._fitting(item) for item in self._encode(rows)]
        for row, item in zip(rows, items, strict=True):
            if item is None:
                raise _too_long(row, self.max_length)
        return self._possible([item for item in items if item])

    def sift(
        self, rows: Sequence[Row], *, ranked: bool = False, empty: bool = False
    ) -> tuple[list[Rendered], list[Row]]:
        """The rendered rows, and the rows left out for their length by `on_long_row`: all that are
        too long (`skip`), or those that are too long even without a prompt (`cut`). With `ranked`,
        each better and worse answer has to fit too.

        Raises:
            CellError: a row is too long (`fail`), all are left out (unless `empty`), or one exceeds
                the model's limits.
        """
        kept: list[Rendered] = []
        left: list[Row] = []
        for row, whole in zip(rows, self._encode(rows), strict=True):
            more = self._longer(whole) if ranked else 0
            length = len(whole.ids) + more
            if length > self.max_length and self.on_long_row == "fail":
                raise CellError(
                    "bad-data",
                    f"Row {row.id} has {length} tokens, more than max_length="
                    f"{self.max_length}; raise train.max_length, or set train.on_long_row to skip "
                    "or cut.",
                )
            long = length > self.max_length and self.on_long_row == "skip"
            if item := None if long else self._fitting(whole, more):
                kept.append(item)
            else:
                left.append(row)
        if left and not kept and not empty:
            raise _too_long(left[0], self.max_length)
        return self._possible(kept), left

    def answers(
        self, items: Sequence[Rendered], answers: Sequence[Sequence[str]], *, ended: bool = False
    ) -> list[list[list[int]]]:
        """Ids of other answers to each item, any number per item; with the end if `ended`."""
        template, tokenizer = self.template, self.tokenizer
        joined = self._joined if ended else []
        end = self.end_ids if ended and not joined else []

        def is_own(item: Rendered, text: str) -> bool:
            return text == item.row.answer and not self._joined

        new = [
            (template.segments(item.row, tokenizer), [*template.written(text, tokenizer), *joined])
            for item, options in zip(items, answers, strict=True)
            for text in options
            if not is_own(item, text)
        ]
        wholes = self._encode_all([[*prompt, *answer] for prompt, answer in new])
        others = iter(zip(wholes, [answer for _, answer in new], strict=True))
        return [
            [
                (
                    item.answer_ids[: -len(self.end_ids)]
                    if is_own(item, text)
                    else self._after(item.prompt_ids, *next(others))
                )
                + end
                for text in options
            ]
            for item, options in zip(items, answers, strict=True)
        ]

    @cached_property
    def _joined(self) -> Segments:
        """The end, if it begins with text that may merge with the last token of an answer."""
        return [(self.template.end(self.tokenizer), True)] if len(self.end_ids) > 1 else []

    def _encode(self, rows: Sequence[Row]) -> list[Rendered]:
        """The rows at their full length."""
        template, tokenizer = self.template, self.tokenizer
        segments = [template.segments(row, tokenizer) for row in rows]
        answers = [[*template.written(row.answer, tokenizer), *self._joined] for row in rows]
        end = [] if self._joined else self.end_ids
        prompts = self._encode_all(segments)
        wholes = self._encode_all([[*s, *a] for s, a in zip(segments, answers, strict=True)])
        return [
            Rendered(row, [*prompt, *self._after(prompt, whole, answer), *end], len(prompt))
            for row, answer, prompt, whole in zip(rows, answers, prompts, wholes, strict=True)
        ]

    def _after(self, prompt: list[int], whole: list[int], answer: Segments) -> list[int]:
        """The answer's ids: from the whole text if the tokenizer keeps the border to the prompt,
        else encoded separately; either way the prompt's tokens do not depend on the answer."""
        kept = whole[: len(prompt)] == prompt
        return whole[len(prompt) :] if kept else self._apart(answer)

    def _encode_all(self, rows: Sequence[Segments]) -> list[list[int]]:
        """Ids of each row's segments, after one BOS if the template does not write it. Only the
        template's own control tokens are encoded as such."""
        out: list[list[int]] = [[] for _ in rows]
        for control in (False, True):
            alike = [n for n, row in enumerate(rows) if all(c == control for _, c in row)]
            texts = ["".join(text for text, _ in rows[n]) for n in alike]
            encoded = self.tokenizer.encode_batch(texts, controls=control) if texts else []
            for n, ids in zip(alike, encoded, strict=True):
                out[n] = ids
        for n, row in enumerate(rows):
            if len({control for _, control in row}) > 1:
                out[n] = self._apart(row)
        bos = self.tokenizer.bos_id if self.template.adds_bos else None
        return [ids if bos is None else [bos, *ids] for ids in out]

    def _apart(self, segments: Segments) -> list[int]:
        """Ids of segments, with control tokens and text encoded separately."""
        ids: list[int] = []
        for control, group in groupby(segments, key=lambda segment: segment[1]):
            ids += self._piece("".join(text for text, _ in group), control, inside=bool(ids))
        return ids

    def _piece(self, text: str, control: bool, inside: bool) -> list[int]:
        encode = self.tokenizer.encode
        if not control and len(text) > 1 and text in self.tokenizer.added:
            # Only special tokens can be encoded as text; another added token is split in two.
            return self._piece(text[:1], False, inside) + self._piece(text[1:], False, True)
        if inside:  # sentencepiece adds a space at the beginning of a text, so add a line before
            line = encode("\n")
            ids = encode("\n" + text, controls=control)
            if ids[: len(line)] == line:
                return ids[len(line) :]
        return encode(text, controls=control)

    def _possible(self, items: list[Rendered]) -> list[Rendered]:
        """Check the items against the model's limits.

        Raises:
            CellError: one exceeds them.
        """
        for item in items:
            self.limits.check(item.row.id, item.ids)
        return items

    def _longer(self, item: Rendered) -> int:
        """Number of tokens by which the longest of the better and worse answers exceeds the
        answer."""
        texts = () if item.row.candidates else (*item.row.better, *item.row.worse)
        lengths = map(len, self.answers([item], [texts], ended=True)[0])
        return max(0, max(lengths, default=0) - len(item.answer_ids))

    def _fitting(self, item: Rendered, more: int = 0) -> Rendered | None:
        """The item, with the end of its prompt cut until it and `more` tokens fit; None if template
        and answer alone do not fit."""
        if len(item.ids) + more <= self.max_length:
            return item
        if self.on_long_row == "cut-end":
            kept = item.ids[: self.max_length]
            return replace(item, ids=kept, cut_tokens=len(item.ids) - len(kept))
        words = self.tokenizer.encode(item.row.prompt)
        keep, short = len(words), item
        while (excess := len(short.ids) + more - self.max_length) > 0:
            # A prompt may take more tokens in a conversation than alone.
            keep = keep - excess if excess < keep else keep // 2
            if not keep:
                return None
            row = item.row.with_prompt(self.tokenizer.decode(words[:keep]).rstrip("\ufffd"))
            short = self._encode([row])[0]
        return Rendered(short.row, short.ids, short.num_prompt, len(words) - keep)


def _too_long(row: Row, max_length: int) -> CellError:
    return CellError(
        "bad-data",
        f"Row {row.id}: template and answer alone take more than max_length={max_length} tokens; "
        "raise train.max_length.",
    )


def show_mask(item: Rendered, tokenizer: Tokenizer) -> tuple[str, str]:
    """A rendered row as text with special tokens: (not supervised, supervised)."""
    prompt, answer = (tokenizer.shown(ids) for ids in (item.prompt_ids, item.answer_ids))
    return prompt, answer
