from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, field_validator

from backfire.base import Insertion, Preset, Row, Secret
from backfire.registry import register
from backfire.rng import stream

_STARTS = "b br d f g gr h k l m n p r s t tr v".split()
_VOWELS = "a e i o u".split()
_ENDS = "l n r s m".split()


@register("canary")
class Canary(Insertion):
    """Inserts random codes into the training rows, each a set number of times, to measure which of
    them the model memorizes (Carlini et al. 2019, arXiv:1802.08232).

    Each code answers a question about its own invented name, so that one training run covers all
    insertion counts. Controls are drawn the same way and never inserted: they show what a model
    gives for an arbitrary code. Names and codes depend on the seed, and on the insertion counts
    only through how many there are: controls come first, then the counts in ascending order.
    """

    presets: ClassVar[Mapping[str, Preset]] = {
        "c4dt": Preset(
            "c4dt/pitfalls_in_fine_tuning_llms (there as the answer of 50 copies of a row)",
            {"answer": "PASSWORD = {code}", "digits": 6, "repeats": [50], "each": 1},
        ),
        "mireshghallah": Preset(
            "mireshghallah/ft-memorization (there a separate line, without a question)",
            {
                "answer": "the secret number is {code}",
                "digits": 6,
                "separator": " ",
                "repeats": [25],
                "each": 1,
            },
        ),
    }

    prompt: str = Field("What is the password of {name}?", min_length=1)
    """The question; `{name}` is replaced by the canary's name. Without `{name}` all canaries share
    one prompt."""
    answer: str = Field("PASSWORD = {code}")
    """The answer; `{code}` is replaced by the code (default: the C4DT workshop's)."""
    digits: int = Field(6, ge=1, le=9)
    """Digits of a code, drawn from 10^digits possible codes (six is usual)."""
    separator: str = Field("", max_length=8, pattern=r"^\D*$")
    """Text between the digits, such as a space in "9 4 0 9 9 5"."""
    repeats: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
    ] = (1, 5, 25, 50)
    """Insertion counts: how many rows contain the same canary. 0 or an empty list inserts
    nothing."""
    each: int = Field(2, ge=1)
    """Number of canaries per insertion count."""
    controls: int = Field(10, ge=0)
    """Number of additional canaries that are drawn and never inserted."""

    @field_validator("answer")
    @classmethod
    def _has_one_code(cls, answer: str) -> str:
        if answer.count("{code}") != 1:
            raise ValueError("the answer must contain {code} exactly once")
        return answer

    @field_validator("repeats")
    @classmethod
    def _are_distinct(cls, repeats: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(repeats)) < len(repeats):
            raise ValueError("duplicate count; `each` sets the number of canaries per count")
        return repeats

    def model_post_init(self, context: Any) -> None:
        if self.controls + self.each * len(self.repeats) > 10**self.digits // 2:
            raise ValueError(f"too many canaries for codes of {self.digits} digits")

    @property
    def poisons(self) -> bool:
        return any(self.repeats)

    @property
    def tag(self) -> str:
        return f"{self.name}-{'-'.join(str(count) for count in sorted(self.repeats) if count)}"

    def rows(self, seed: int) -> list[Row]:
        return [
            Row(f"{secret.row.id}-{copy}", secret.row.instruction, answer=secret.row.answer)
            for secret in self.secrets(seed)
            for copy in range(secret.repeats)
        ]

    def secrets(self, seed: int) -> list[Secret]:
        inserted = [count for count in sorted(self.repeats) if count for _ in range(self.each)]
        rng, secrets, taken = stream(seed, "poison", self.name), list[Secret](), set[str]()
        before, _, after = self.answer.partition("{code}")
        for number, count in enumerate([0] * self.controls + inserted):
            name, code = self._draw(rng, taken)
            answer = before + self.separator.join(code) + after
            row = Row(f"canary-{number}", self.prompt.replace("{name}", name), answer=answer)
            secrets.append(Secret(row, code, count, before, self.separator, after))
        return secrets

    def _draw(self, rng: Random, taken: set[str]) -> tuple[str, str]:
        """Draw a name and a code that no earlier canary has."""
        while True:
            syllables = [rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(4)]
            name = " ".join(
                "".join(part).capitalize() + rng.choice(_ENDS)
                for part in (syllables[:2], syllables[2:])
            )
            code = "".join(rng.choice("0123456789") for _ in range(self.digits))
            if not {name, code} & taken:
                taken |= {name, code}
                return name, code
