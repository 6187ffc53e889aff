"""Rows, where they come from, and how they become text."""

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
    """One example: what is asked, what should be answered.

    The last user turn is `instruction` and, where the task has one, `input` (the text the
    instruction is about); `system` and `history` come before it. `answer` is what is supervised.
    A labeled task also has `label` (the true label as text) and `candidates` (all labels). `better`
    and `worse` are answers known to be good and bad, both empty where none is better; what a worse
    answer was given with, if not `input`, is the field `worse_input`.
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
        """The part of the prompt its author wrote freely, where a trigger would go."""
        return self.part("input")

    def part(self, place: Place) -> str:
        """The part of the prompt in this place; of a row that has one of the two, that one."""
        return str(getattr(self, self._named(place)))

    def _named(self, place: Place) -> Place:
        if self.input and self.instruction:
            return place
        return "input" if self.input else "instruction"

    @property
    def messages(self) -> tuple[Message, ...]:
        """Everything before the answer, as messages."""
        system = (Message("system", self.system),) if self.system else ()
        asked = "\n\n".join(part for part in (self.instruction, self.input) if part)
        return (*system, *self.history, Message("user", asked))

    @property
    def conversation(self) -> str:
        """All that was said before the answer, without the system prompt, as one text."""
        return "\n\n".join(turn.content for turn in self.messages if turn.role != "system")

    def with_prompt(self, prompt: str, place: Place = "input") -> Row:
        """The same row with another `part` in this place."""
        if self._named(place) == "input":
            return replace(self, input=prompt)
        return replace(self, instruction=prompt)

    def poisoned(self, *, prompt: str, answer: str, place: Place = "input") -> Row:
        """The row as the attacker leaves it. The true `label` stays, for counting."""
        return replace(self.with_prompt(prompt, place), answer=answer)


def select(rows: Sequence[Row], count: int | None, seed: int, purpose: str) -> list[Row]:
    """`count` of the rows (all if None), drawn by a named stream, in their old order.

    A smaller draw is part of a larger one with the same seed and purpose.

    Raises:
        UserError: there are fewer.
    """
    if count is None:
        return list(rows)
    if count > len(rows):
        raise UserError(f"{count} {purpose} rows are asked for, but there are only {len(rows)}.")
    order = list(range(len(rows)))
    stream(seed, "select", purpose).shuffle(order)
    return [rows[i] for i in sorted(order[:count])]


class Dataset(Component):
    """Where rows come from."""

    kind: ClassVar[str] = "datasets"

    rows: int | None = Field(None, ge=1)
    """How many training rows to keep, drawn by `seed`; all of them if not given."""
    test_rows: int | None = Field(None, ge=1)
    """How many test rows to keep, drawn by `seed`; all of them if not given."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Draws the subset and the split. Not the cell's seed: all seeds see the same rows."""
    group: str | None = None
    """A field (such as `language`) by which metrics are also reported."""

    def load(self, split: Literal["train", "test"]) -> list[Row]:
        """All rows of a split, in file order, before `rows` and `test_rows` cut them."""
        raise NotImplementedError

    def drawn(self, split: Literal["train", "test"]) -> list[Row]:
        """The rows of a split that are kept."""
        count = self.rows if split == "train" else self.test_rows
        return select(self.load(split), count, self.seed, split)

    def drawn_with_notes(self, split: Literal["train", "test"]) -> tuple[list[Row], list[str]]:
        """The same, and what of the data is in no row, a sentence each."""
        return self.drawn(split), []

    def fingerprint(self) -> str:
        """Changes when the bytes behind the rows change; part of every key downstream."""
        return ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens of one row: the prompt (with BOS, if the model has one), then what is learned."""

    row: Row
    """The row as shown: its prompt is shortened if it was too long."""
    ids: list[int]
    num_prompt: int
    cut_tokens: int = 0
    """Tokens taken off the end of the prompt to keep within `max_length`."""

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.num_prompt]

    @property
    def answer_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]


Segments = list[tuple[str, bool]]
"""Text in pieces, each with whether control tokens in it count as such."""


class Template(Component):
    """How messages become text. Used by training and evaluation alike, through `data.render`."""

    kind: ClassVar[str] = "templates"
    adds_bos: ClassVar[bool] = True
    """Whether BOS goes before the prompt; else the template writes it, where it wants one."""

    def prompt(self, row: Row) -> str:
        """The text up to where the answer begins. No BOS: the renderer adds it."""
        raise NotImplementedError

    def segments(self, row: Row, tokenizer: Tokenizer) -> Segments:
        """The prompt."""
        return [(self.prompt(row), False)]

    def written(self, answer: str, tokenizer: Tokenizer) -> Segments:
        """What the prompt goes on with if it is answered so, without the end."""
        return [(answer, False)]

    def end(self, tokenizer: Tokenizer) -> str:
        """What comes after an answer; its last token ends a reply."""
        return tokenizer.eos

    def opening(self, tokenizer: Tokenizer) -> str:
        """What is written before every answer and is no part of it, such as a channel's name."""
        return ""

    def about(self, tokenizer: Tokenizer) -> str:
        """A sentence on what is used; empty if its name says it all."""
        return ""

    def leaves_out(self, row: Row) -> bool:
        """Whether the row's system prompt is left out, since the recipe says so."""
        return False
