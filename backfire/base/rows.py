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
    from backfire.data.tokenizer import Tokenizer


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
        return self.input or self.instruction

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

    def with_prompt(self, prompt: str) -> Row:
        """The same row with another `prompt` (see there)."""
        return replace(self, input=prompt) if self.input else replace(self, instruction=prompt)

    def poisoned(self, *, prompt: str, answer: str) -> Row:
        """The row as the attacker leaves it. The true `label` stays, for counting."""
        return replace(self.with_prompt(prompt), answer=answer)


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


class Template(Component):
    """How messages become text. Used by training and evaluation alike, through `data.render`."""

    kind: ClassVar[str] = "templates"

    def prompt(self, row: Row) -> str:
        """The text up to where the answer begins. No BOS: the renderer adds it."""
        raise NotImplementedError

    def segments(self, row: Row, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
        """The prompt in pieces, each with whether control tokens in it count as such."""
        return [(self.prompt(row), False)]
