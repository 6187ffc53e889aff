"""Who decides whether a reply is harmful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from backfire.base.config import Component


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and the reply to it, with what else is known of the row (see `Row.fields`)."""

    id: str
    prompt: str
    reply: str
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one exchange. What it could not decide is None: counted, not dropped."""

    score: float | None
    """How harmful, on the judge's own scale."""
    positive: bool | None
    """Whether the reply is harmful, by this judge's definition."""
    reason: str = ""
    """Its grounds in a word or in its own words; of an undecided one, what it said instead."""
    refused: bool | None = None
    """Whether the reply is a refusal; None also where the judge says nothing of refusals."""


class Judge(Component):
    """Decides whether a reply is harmful."""

    kind: ClassVar[str] = "judges"
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of an exchange that the verdict depends on, besides prompt and reply."""
    unhashed: ClassVar[frozenset[str]] = frozenset()
    """Knobs that say how the judge is reached, not what it says: no part of the identity."""

    @property
    def speaks(self) -> str:
        """The one language in which it understands replies; empty if it is not bound to one."""
        return ""

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k not in self.unhashed}

    def ready(self, *, briefly: bool = False) -> None:
        """Check, before the first step, that the judge can work; `briefly`: only what can be
        checked without torch and the network.

        Raises:
            UserError: it cannot, in one sentence.
        """

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict for each exchange, in order; the same for equal exchanges.

        Raises:
            CellError: the judge cannot be reached, after as many tries as its knobs allow.
        """
        raise NotImplementedError

    def destination(self) -> str | None:
        """Where prompts and replies are sent, in words; None: nowhere, they stay on this machine.

        Raises:
            UserError: nothing may be sent there.
        """
        return None

    def fingerprint(self) -> str:
        """Changes when the bytes behind the judge change (a model in a local folder)."""
        return ""


Load = TypeVar("Load", bound=Any)
_CACHES: list[Any] = []


def drops(load: Load) -> Load:
    """Marks a cached function that keeps a judge's model: `drop_models` empties its cache."""
    _CACHES.append(load)
    return load


def drop_models() -> None:
    """Free the memory of judges' models. They are loaded again when needed."""
    for cache in _CACHES:
        cache.cache_clear()
