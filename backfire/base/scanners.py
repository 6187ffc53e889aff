"""Base class of scanners, which look for rows that may be poisoned or should not be learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from backfire.base.config import Component
from backfire.base.rows import Row
from backfire.errors import UserError


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scanner finds in one row; by default nothing."""

    score: float = 0.0
    """How suspicious the row is, from 0, in multiples of the scanner's threshold."""
    reason: str = ""
    """What was found, with the counts by which a person can check it."""
    flagged: bool = False
    """Whether the score reaches the threshold, that is, 1."""
    marks: tuple[str, ...] = ()
    """Parts of the row's text that the reason is about."""


NOTHING = Finding()


class Scanner(Component):
    """Looks for rows that may be poisoned or should not be learned; without a model, except for a
    `ModelScanner`."""

    kind: ClassVar[str] = "scanners"
    blind: ClassVar[str] = ""
    """What it cannot see, in one sentence."""
    needs_test: ClassVar[bool] = False
    """Whether it compares rows with those of a test set, and finds nothing without one."""
    needs_prompt: ClassVar[bool] = False
    """Whether it compares prompts with answers, and finds nothing in a text without a prompt."""
    reads_worse: ClassVar[bool] = False
    """Whether it also reads answers marked as bad that stand beside a row's `answer`."""
    in_text: ClassVar[bool] = False
    """Whether a flag can be checked by reading: what its reason names is in the text, such as a key
    or a copy of another row."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        """Yield one finding for each row, in order. `test` are the rows of a test set, if given.

        Both can be iterated several times, with the same rows each time. There may be a
        million of them: what is kept from one to the next must be bounded. They are rows
        `as_learned`. An `id` is no part of what a model learns, and must not change a score.
        """
        raise NotImplementedError

    def by_chance(self, rows: list[Row]) -> list[Row] | None:
        """The same rows with what the scanner looks for removed, such as with shuffled answers:
        what it flags in them is a false alarm. None if that cannot be done."""
        return None


Array = Any
"""A numpy array."""
Measure = Literal["replies", "losses", "words", "tuned", "states", "gradients"]
"""What a model can measure in rows: the fields of `Measured`. The last three are measured after a
short tuning on the rows, the probe."""


@dataclass(frozen=True)
class Measured:
    """What a model measures in rows; only the fields that a scanner's `needs` name are filled."""

    replies: Sequence[str] = ()
    """The model's own reply to each prompt, of at most 64 tokens, greedily."""
    losses: Array = ()
    """Mean negative log-likelihood of each answer's tokens, in nats [row]."""
    words: Sequence[Sequence[tuple[str, float]]] = ()
    """The most surprising words of each prompt, with the log-perplexity of the prompt less that of
    the prompt without the word, in nats."""
    tuned: Array = ()
    """`losses` after the probe [row]."""
    states: Array = ()
    """Hidden states after the probe [row, feature], float32: at the prompt's last token and the
    mean over the answer, of the middle layer and the last but one, each of mean square 1."""
    gradients: Array = ()
    """Random projection of the gradient of the answer's mean loss with respect to the head, after
    the probe [row, feature], float32."""


class ModelScanner(Scanner):
    """Looks for rows by what a model says about them: the base that is to be tuned, or any other.

    It is handed numbers rather than the model, so it can be tested without one; the model is loaded
    once, and tuned once, for all scanners.
    """

    needs: ClassVar[frozenset[Measure]] = frozenset()
    """What the model is to measure."""
    null: ClassVar[str] = ""
    """What `by_chance_of` returns, in words."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        """One finding for each row, in order; the rows are as those of `scan`."""
        raise NotImplementedError

    def by_chance_of(
        self, rows: Sequence[Row], measured: Measured
    ) -> tuple[Sequence[Row], Measured] | None:
        """Rows and measurements with what the scanner looks for removed: what it flags in them is a
        false alarm. None if that cannot be done."""
        return None

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        """Not without a model.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.label()} requires a model; name one, as in --model sandbox.")


Look = Callable[[ModelScanner, Sequence[Row]], list[Finding]]
"""How a model is asked about rows: the findings of a scanner, one for each row."""


def as_learned(row: Row, *, rejected: bool = False) -> Row:
    """The row as scanners get it: with what a model would learn from it, and nothing that tells a
    poisoned row, such as its true label, other columns, or an answer that is known to be good.

    Answers that are marked as bad are no part of it either, since no method here learns from them,
    and the attack that gives a bad answer would be seen by them. With `rejected`, as of a file of
    unknown use, they are left; if there is no other answer, the first one is that of the row.
    """
    answer, worse = row.answer, row.worse if rejected else ()
    if not answer and worse:
        answer, *others = worse
        worse = tuple(others)
    return replace(row, answer=answer, label=None, fields={}, better=(), worse=worse)


def parts(row: Row) -> Iterator[tuple[str, str]]:
    """The texts of a row that are learned or read, each with its name."""
    named = [("system prompt", row.system)]
    named += [(f"{turn.role} turn {n}", turn.content) for n, turn in enumerate(row.history, 1)]
    named += [("instruction", row.instruction), ("input", row.input), ("answer", row.answer)]
    named += [("worse answer", text) for text in row.worse if text != row.answer]
    return ((name, text) for name, text in named if text)


def shuffled(rows: list[Row], order: list[int]) -> list[Row]:
    """The rows, each with the answer of the row at its place in `order`."""
    return [replace(row, answer=rows[i].answer) for row, i in zip(rows, order, strict=True)]
