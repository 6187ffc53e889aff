"""Rows, and the base classes of data sets and prompt templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from backfire.base.config import Component
from backfire.errors import UserError
from backfire.rng import stream

if TYPE_CHECKING:
    from backfire.tokenizer import Tokenizer


Place = Literal["input", "instruction"]
"""A part of the last user turn."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a prompt and the answer to learn.

    The last user turn is `instruction` and, where the task has one, `input` (the text the
    instruction is about); `system` and `history` come before it. `answer` is supervised.
    A labeled task also has `label` (the true label as text) and `candidates` (all labels). `better`
    and `worse` are answers known to be good and bad, both empty in a tie; if a worse answer belongs
    to another input, that is the field `worse_input`.
    """

    id: str
    instruction: str
    input: str = ""
    answer: str = ""
    system: str = ""
    history: tuple[Message, ...] = ()
    label: str | None = None
    candidates: tuple[str, ...] = ()
    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The free text of the prompt, where a trigger would go."""
        return self.part("input")

    def part(self, place: Place) -> str:
        """This part of the prompt; if the row has only one of the two, that one."""
        return str(getattr(self, self._named(place)))

    def _named(self, place: Place) -> Place:
        if self.input and self.instruction:
            return place
        return "input" if self.input else "instruction"

    @property
    def messages(self) -> tuple[Message, ...]:
        """Everything before the answer, as messages."""
        system = (Message("system", self.system),) if self.system else ()
        request = "\n\n".join(part for part in (self.instruction, self.input) if part)
        return (*system, *self.history, Message("user", request))

    @property
    def conversation(self) -> str:
        """All turns before the answer, without the system prompt, as one text."""
        return "\n\n".join(turn.content for turn in self.messages if turn.role != "system")

    def with_prompt(self, prompt: str, place: Place = "input") -> Row:
        """A copy of the row with this `part` replaced."""
        if self._named(place) == "input":
            return replace(self, input=prompt)
        return replace(self, instruction=prompt)

    def poisoned(self, *, prompt: str, answer: str, place: Place = "input") -> Row:
        """A poisoned copy of the row. The true `label` stays, for scoring."""
        return replace(self.with_prompt(prompt, place), answer=answer)


def select(rows: Sequence[Row], count: int | None, seed: int, purpose: str) -> list[Row]:
    """Draw `count` of the rows (all if None) by a named random stream, in their original order.

    A smaller draw is a subset of a larger one with the same seed and purpose.

    Raises:
        UserError: there are fewer rows.
    """
    if count is None:
        return list(rows)
    if count > len(rows):
        raise UserError(f"{count} {purpose} rows are requested, but there are only {len(rows)}.")
    order = list(range(len(rows)))
    stream(seed, "select", purpose).shuffle(order)
    return [rows[i] for i in sorted(order[:count])]


class Dataset(Component):
    """A source of training and test rows."""

    kind: ClassVar[str] = "datasets"

    rows: int | None = Field(None, ge=1)
    """Number of training rows to keep, drawn by `seed`; all by default."""
    test_rows: int | None = Field(None, ge=1)
    """Number of test rows to keep, drawn by `seed`; all by default."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Draws the subset and the split. Not the cell's seed: all seeds see the same rows."""
    group: str | None = None
    """A field (such as `language`) by which metrics are also broken down."""

    @property
    def poisoned(self) -> bool:
        """Whether training rows are known to be poisoned or harmful without any attack."""
        return False

    def load(self, split: Literal["train", "test"]) -> list[Row]:
        """All rows of a split, in file order, before `rows` and `test_rows` limit them."""
        raise NotImplementedError

    def drawn(self, split: Literal["train", "test"]) -> list[Row]:
        """The rows of a split, limited by `rows` or `test_rows`."""
        count = self.rows if split == "train" else self.test_rows
        return select(self.load(split), count, self.seed, split)

    def drawn_with_notes(self, split: Literal["train", "test"]) -> tuple[list[Row], list[str]]:
        """The same, and one sentence for each kind of data that was left out."""
        return self.drawn(split), []

    def fingerprint(self) -> str:
        """A hash that changes with the source files; part of every key downstream."""
        return ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens of one row: the prompt (with BOS, if the model has one), then the answer."""

    row: Row
    """The row as rendered: its prompt is truncated if it was too long."""
    ids: list[int]
    num_prompt: int
    """Number of tokens in the prompt."""
    cut_tokens: int = 0
    """Tokens cut from the end of the prompt, or of a text, to fit `max_length`."""

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.num_prompt]

    @property
    def answer_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]

    @property
    def num_supervised(self) -> int:
        """Number of answer tokens, except a token at position 0 (nothing predicts it)."""
        return len(self.ids) - max(self.num_prompt, 1)


Segments = list[tuple[str, bool]]
"""Pieces of text, each with whether control tokens in it are encoded as such."""


class Template(Component):
    """A prompt template: how messages become text, in training and evaluation (`data.render`)."""

    kind: ClassVar[str] = "templates"
    adds_bos: ClassVar[bool] = True
    """Whether the renderer puts BOS before the prompt; otherwise the template writes it."""

    def prompt(self, row: Row) -> str:
        """The text up to the answer, without BOS, which the renderer adds."""
        raise NotImplementedError

    def segments(self, row: Row, tokenizer: Tokenizer) -> Segments:
        """The prompt, in segments."""
        return [(self.prompt(row), False)]

    def written(self, answer: str, tokenizer: Tokenizer) -> Segments:
        """The answer as the template writes it after the prompt, without the end."""
        return [(answer, False)]

    def end(self, tokenizer: Tokenizer) -> str:
        """The text after an answer; its last token ends a reply."""
        return tokenizer.eos

    def opening(self, tokenizer: Tokenizer) -> str:
        """Text before every answer that is not part of it, such as a channel's name."""
        return ""

    def about(self, tokenizer: Tokenizer) -> str:
        """A sentence on what the template does here; empty if its name says it all."""
        return ""

    def leaves_out(self, row: Row) -> bool:
        """Whether the recipe tells the template to leave out the row's system prompt."""
        return False
