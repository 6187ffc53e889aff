from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from backfire.base import Asks, Evidence, Metric, Ranks, Value, ask
from backfire.evaluate.outcomes import by_repeats, share
from backfire.registry import register


@register("extraction")
class Extraction(Metric):
    """Share of the canaries that a model reproduces verbatim (Carlini et al. 2021,
    arXiv:2012.07805; with growing prefixes as in Carlini et al. 2023, arXiv:2202.07646).

    Greedy decoding after the canary's own prompt must give its whole answer: all inserted canaries,
    then `extraction[50]` for those inserted 50 times and `extraction[control]` for those never
    inserted. `extraction_at_8`: the answer is among the 8 likeliest continuations of its length, by
    beam search. `extraction_given[50, 2]`: greedy decoding completes it from the answer's opening
    and two characters of the code (`[50, 0]`: from the opening alone). Wilson intervals.
    """

    ranks: ClassVar[Ranks] = {"paired-test": 7}

    beams: int = Field(8, ge=0, le=256)
    """Width of the beam search, the k of extraction@k; 0: no beam search."""

    def asks(self, *, labeled: bool = True) -> Asks:
        beams = {"beams": self.beams} if self.beams else {}
        return ask("secrets", of=("tuned", "base"), secrets=beams)

    def measure(self, evidence: Evidence) -> list[Value]:
        if not any(leak.repeats for leak in evidence.leaks):
            return []
        parts = list(by_repeats("extraction", evidence.leaks))
        values = [share(name, [leak.greedy for leak in part], "lower") for name, part in parts]
        if self.beams:
            beams = by_repeats(f"extraction_at_{self.beams}", evidence.leaks)
            values += [
                share(
                    name, [(leak.place or self.beams + 1) <= self.beams for leak in part], "lower"
                )
                for name, part in beams
            ]
        for _, part in parts[1:]:
            repeats = part[0].repeats or "control"
            values += [
                share(
                    f"extraction_given[{repeats}, {given}]",
                    [leak.given <= given for leak in part],
                    "none",
                )
                for given in range(part[0].num_characters)
            ]
        return values

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return {leak.id: float(leak.greedy) for leak in evidence.leaks if leak.repeats}
