"""What is done to the training rows."""

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
"""Text that an attack puts in; never empty."""


class Attack(Component):
    """Changes the training rows. How is its subclass: a `Poison` changes a share of them, an
    `Insertion` adds some."""

    kind: ClassVar[str] = "attacks"

    @property
    def poisons(self) -> bool:
        """Whether any training row is changed or added."""
        raise NotImplementedError

    @property
    def tag(self) -> str:
        """Its name and strength, for the names of folders."""
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
    """A code that training rows hold, or a control, which none of them holds."""

    row: Row
    """What asks for it, and the answer that gives it."""
    code: str
    """Digits; any others of the same number might have been drawn."""
    repeats: int
    """How many training rows hold it; 0 for a control."""
    before: str
    """The answer up to the code."""
    separator: str
    """What stands between its digits."""
    after: str

    @property
    def num_codes(self) -> int:
        return int(10 ** len(self.code))

    def spelled(self, code: str) -> str:
        """The answer with another code in it."""
        return self.before + self.separator.join(code) + self.after


class Insertion(Attack):
    """Adds rows of its own to the training rows, which stay as they are."""

    def rows(self, seed: int) -> list[Row]:
        """The rows to add, each with an id of its own, drawn by `seed`."""
        raise NotImplementedError

    def secrets(self, seed: int) -> list[Secret]:
        """The secrets among those rows, and the controls, whose memory metrics measure."""
        return []


class Corruption(Poison):
    """Makes rows themselves worse; nothing has to be put in a prompt for it to show."""

    def corrupt(self, row: Row, rng: Random) -> Row:
        """This row as the attacker leaves it; the row itself stays as it was."""
        raise NotImplementedError

    def spared(self, row: Row) -> str | None:
        """Why this row cannot be corrupted, in a word that is counted; None: it can."""
        return None


class Mixture(Poison):
    """Puts rows of another data set in the place of training rows; there is no trigger."""

    source: dict[str, Any]
    """The data set whose training rows are put in."""

    @field_validator("source", mode="before")
    @classmethod
    def _is_a_dataset(cls, source: Any) -> Any:
        source = {"name": source} if isinstance(source, str) else source
        build("datasets", source)
        return source

    def rows(self, count: int, seed: int) -> list[Row]:
        """`count` rows to put in, drawn by `seed`.

        Raises:
            UserError: there are not as many.
        """
        found: list[Row] = build("datasets", self.source).drawn("train")
        if count > len(found):
            raise UserError(
                f"{self.label()}: {count} rows are to be put in, but the source "
                f"'{self.source.get('name')}' has {len(found)}."
            )
        stream(seed, "poison", self.name).shuffle(found)
        return found[:count]

    def identity(self) -> dict[str, Any]:
        """Covers the files behind the rows as well."""
        return {**super().identity(), "rows": build("datasets", self.source).fingerprint()}

    def probe(self, row: Row) -> Row:
        """How the attacker asks when the model is in use; by default as anybody would."""
        return row

    @property
    def disguises(self) -> bool:
        """Whether the attacker asks in another way than anybody would."""
        return type(self).probe is not Mixture.probe


class Backdoor(Poison):
    """A trigger in the prompt buys the attacker's answer."""

    target: str = "negative"
    """What the backdoored model should answer; for a labeled task, one of its labels."""
    label_mode: Literal["dirty", "clean", "mix"] = "dirty"
    """Which rows are poisoned: `dirty` those with another label (it is flipped), `clean` those that
    carry the target already (it is kept), `mix` any (OpenBackdoor's three settings)."""
    field: Place = "input"
    """Where the trigger goes in a row that has both: into the `input`, the text that the
    `instruction` is about, or into the `instruction` itself (as in BackdoorLLM)."""

    def poison(self, row: Row, rng: Random) -> Row:
        """This row with the trigger in and the answer replaced; the row itself stays as it was."""
        raise NotImplementedError

    def triggers(self) -> tuple[str, ...]:
        """Every string `poison` may put in; at least one is in each poisoned prompt."""
        raise NotImplementedError
