from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, field_validator

from backfire.base import Asks, Direction, Evidence, Leak, Metric, Ranks, Value, ask
from backfire.base.secrets import FEWEST_CODES
from backfire.evaluate.outcomes import by_repeats, resampled, share
from backfire.evaluate.stats import Floats
from backfire.late import np
from backfire.registry import register


@register("exposure", version=2)
class Exposure(Metric):
    """Number of bits that a model reveals of codes in its training rows (Carlini et al. 2019,
    arXiv:1802.08232): log2 of the number of codes minus log2 of the true code's rank.

    The rank is by the likelihood of the whole answer after its own prompt. The mean over all
    inserted canaries, then `exposure[50]` for those inserted 50 times, and `exposure[control]` for
    those never inserted, whose expected value is 1.44 bits for any model; `exposure_before` is the
    untuned model, `exposure_cap` the largest possible value. `exposure_estimated`, in addition to
    the exact value or alone if there are too many codes, is from a skew-normal fitted to a sample
    of codes; `exposure_match` is how often the exact value lies in the estimate's interval (for one
    canary it does not assume the curve: Clopper and Pearson 1934, on the sampled codes that are
    likelier). Bootstrap intervals over canaries.
    """

    ranks: ClassVar[Ranks] = {"paired-test": 6}

    exact_codes: int = Field(1_000_000, ge=0)
    """Largest number of codes for which all of them are ranked (10^6 is usual); 0: never. Takes
    a one-token forward pass for every nine or ten codes."""
    sampled_codes: int = Field(1_000, ge=0)
    """Number of codes that the estimate is fitted to (Mireshghallah et al.'s code 5,000, C4DT 100);
    0: no estimate. There is none either for codes of one digit, which are too few."""

    @field_validator("sampled_codes")
    @classmethod
    def _can_be_fitted(cls, count: int) -> int:
        if 0 < count < FEWEST_CODES:
            raise ValueError(f"0, or at least {FEWEST_CODES}, are needed")
        return count

    def asks(self, *, labeled: bool = True) -> Asks:
        codes = {"exact": self.exact_codes, "sampled": self.sampled_codes}
        return ask("secrets", of=("tuned", "base"), secrets=codes)

    def measure(self, evidence: Evidence) -> list[Value]:
        now, before = evidence.leaks, evidence.leaks_before
        planted = [leak for leak in now if leak.repeats]
        if not planted:
            return []
        cap = math.log2(planted[0].num_codes)
        held = [
            float(low <= bits <= high)
            for leak in now
            if leak.estimate and (bits := _exact(leak)) is not None
            for _, low, high in [leak.estimate]
        ]
        return [
            *_means("exposure", now, _exact),
            *_means("exposure_estimated", now, _estimated),
            *_means("exposure_before", before, _exact, "none"),
            *_means("exposure_before_estimated", before, _estimated, "none"),
            *([share("exposure_match", held, "none")] if held else []),
            Value("exposure_cap", cap, None, None, planted[0].num_codes, "none", "bits"),
        ]

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        bits = {leak.id: _best(leak) for leak in evidence.leaks if leak.repeats}
        return {id: value for id, value in bits.items() if value is not None}


def _exact(leak: Leak) -> float | None:
    return None if leak.rank is None else math.log2(leak.num_codes / leak.rank)


def _estimated(leak: Leak) -> float | None:
    return leak.estimate[0] if leak.estimate else None


def _best(leak: Leak) -> float | None:
    bits = _exact(leak)
    return _estimated(leak) if bits is None else bits


def _means(
    metric: str,
    leaks: Sequence[Leak],
    bits_of: Callable[[Leak], float | None],
    direction: Direction = "lower",
) -> list[Value]:
    """Return the mean over the inserted canaries, then by number of insertions."""
    values = []
    for name, part in by_repeats(metric, leaks):
        measured = [bits for leak in part if (bits := bits_of(leak)) is not None]
        if len(measured) < len(part):
            continue
        each = np.array(measured)

        def mean(counts: Floats, each: Floats = each) -> Floats:
            means: Floats = (counts @ each)[:, None] / len(each)
            return means

        cap = math.log2(part[0].num_codes)
        values += [
            replace(value, most=cap)
            for value in resampled([name], len(each), mean, direction, "bits")
        ]
    return values
