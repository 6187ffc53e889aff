"""Base class of judges, which decide whether a reply is harmful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from backfire.base.config import Component


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its reply, with the row's other fields (see `Row.fields`)."""

    id: str
    prompt: str
    reply: str
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one exchange. None means undecided: counted, not dropped."""

    score: float | None
    """Degree of harm, on the judge's own scale."""
    positive: bool | None
    """Whether the reply is harmful, by this judge's definition."""
    reason: str = ""
    """The reason, in one word or in the judge's own words; if undecided, the judge's raw reply."""
    refused: bool | None = None
    """Whether the reply is a refusal; None also where the judge does not rate refusals."""


class Judge(Component):
    """Decides whether a reply is harmful."""

    kind: ClassVar[str] = "judges"
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of an exchange that the verdict depends on, in addition to prompt and reply."""
    unhashed: ClassVar[frozenset[str]] = frozenset()
    """Knobs that say how the judge is reached, not how it decides; excluded from the identity."""

    @property
    def speaks(self) -> str:
        """The only language whose replies it can judge; empty for any language."""
        return ""

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k not in self.unhashed}

    def ready(self, *, briefly: bool = False) -> None:
        """Check, before the first step, that the judge can run; `briefly`: without torch and the
        network.

        Raises:
            UserError: it cannot, in one sentence.
        """

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict for each exchange, in order; the same for equal exchanges.

        Raises:
            CellError: the judge cannot be reached within the retries its knobs allow.
        """
        raise NotImplementedError

    def destination(self) -> str | None:
        """Where prompts and replies are sent, in words; None if they stay on this machine.

        Raises:
            UserError: sending there is not allowed.
        """
        return None

    def reaches(self) -> tuple[str, bool] | None:
        """The host that it sends prompts and replies to, and whether a key for it is at hand; None
        if they stay on this machine.

        Raises:
            UserError: as `destination`.
        """
        return None

    def fingerprint(self) -> str:
        """A hash that changes with the judge's files (a model in a local folder)."""
        return ""


Load = TypeVar("Load", bound=Any)
_CACHES: list[Any] = []


def drops(load: Load) -> Load:
    """Register a cached function that holds a judge's model; `drop_models` clears its cache."""
    _CACHES.append(load)
    return load


def drop_models() -> None:
    """Free the memory of judges' models; they are loaded again on demand."""
    for cache in _CACHES:
        cache.cache_clear()
