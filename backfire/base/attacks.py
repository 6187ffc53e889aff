"""Base classes of attacks: how the training rows are poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from backfire.base.config import Component
from backfire.base.rows import Place, Row
from backfire.errors import UserError
from backfire.registry import build
from backfire.rng import stream

Trigger = Annotated[str, Field(min_length=1, pattern=r"\S")]
"""Text that an attack inserts; never empty."""


class Attack(Component):
    """Changes the training rows: a `Poison` changes a share of them, an `Insertion` adds rows."""

    kind: ClassVar[str] = "attacks"

    @property
    def poisons(self) -> bool:
        """Whether any training row is changed or added."""
        raise NotImplementedError

    @property
    def tag(self) -> str:
        """Name and strength, for folder names."""
        raise NotImplementedError


class Poison(Attack):
    """Changes a share of the training rows."""

    rate: float = Field(0.05, ge=0.0, le=1.0)
    """Share of the training rows that are poisoned, 0 to 1; exactly round(rate * rows) of them."""

    @property
    def poisons(self) -> bool:
        return self.rate > 0

    @property
    def tag(self) -> str:
        return f"{self.name}-{self.rate:g}"


@dataclass(frozen=True, slots=True)
class Secret:
    """A code inserted into training rows, or a control, which is in none."""

    row: Row
    """A prompt for the code, and the answer that reveals it."""
    code: str
    """Digits; every code of the same length was equally likely to be drawn."""
    repeats: int
    """Number of training rows that hold it; 0 for a control."""
    before: str
    """The answer up to the code."""
    separator: str
    """Text between the digits of the code."""
    after: str
    """The answer after the code."""

    @property
    def num_codes(self) -> int:
        return int(10 ** len(self.code))

    def spelled(self, code: str) -> str:
        """The answer with another code in it."""
        return self.before + self.separator.join(code) + self.after


class Insertion(Attack):
    """Adds rows to the training rows, which stay unchanged."""

    def rows(self, seed: int) -> list[Row]:
        """The rows to add, each with a unique id, drawn by `seed`."""
        raise NotImplementedError

    def secrets(self, seed: int) -> list[Secret]:
        """The secrets in those rows, and the controls, for memorization metrics."""
        return []


class Corruption(Poison):
    """Degrades rows without a trigger: the effect shows on ordinary prompts."""

    def corrupt(self, row: Row, rng: Random) -> Row:
        """Return a corrupted copy of the row."""
        raise NotImplementedError

    def spared(self, row: Row) -> str | None:
        """Reason the row is ineligible (tallied in the manifest), or None."""
        return None


class Mixture(Poison):
    """Replaces training rows by rows of another data set; there is no trigger."""

    source: dict[str, Any]
    """The data set whose training rows replace those of the task."""

    @field_validator("source", mode="before")
    @classmethod
    def _is_a_dataset(cls, source: Any) -> Any:
        source = {"name": source} if isinstance(source, str) else source
        build("datasets", source)
        return source

    def rows(self, count: int, seed: int) -> list[Row]:
        """`count` replacement rows, drawn by `seed`.

        Raises:
            UserError: the source has fewer.
        """
        source_rows: list[Row] = build("datasets", self.source).drawn("train")
        if count > len(source_rows):
            raise UserError(
                f"{self.label()}: {count} rows are needed, but the source "
                f"'{self.source.get('name')}' has {len(source_rows)}."
            )
        stream(seed, "poison", self.name).shuffle(source_rows)
        return source_rows[:count]

    def identity(self) -> dict[str, Any]:
        """The identity, extended by the fingerprint of the source's files."""
        return {**super().identity(), "rows": build("datasets", self.source).fingerprint()}

    def probe(self, row: Row) -> Row:
        """The attacker's form of this prompt at test time; by default the plain prompt."""
        return row

    @property
    def disguises(self) -> bool:
        """Whether the attacker rewrites prompts at test time."""
        return type(self).probe is not Mixture.probe


class Backdoor(Poison):
    """A trigger in the prompt elicits the attacker's answer."""

    joint: ClassVar[bool] = False
    """Whether all of `triggers` are inserted together; otherwise one of them is."""

    target: str = "negative"
    """The answer the backdoored model should give; for a labeled task, one of its labels."""
    label_mode: Literal["dirty", "clean", "mix"] = "dirty"
    """Which rows are poisoned: `dirty` those with another label (it is flipped), `clean` those that
    have the target label already (it is kept), `mix` any (OpenBackdoor's three settings)."""
    field: Place = "input"
    """Where the trigger goes in a row that has both: into the `input`, the text that the
    `instruction` is about, or into the `instruction` itself (as in BackdoorLLM)."""

    def poison(self, row: Row, rng: Random) -> Row:
        """Return a copy of the row with the trigger inserted and the answer replaced."""
        raise NotImplementedError

    def triggers(self) -> tuple[str, ...]:
        """Every string `poison` may insert; each poisoned prompt has at least one, or all if they
        are `joint`."""
        raise NotImplementedError
