from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import log
from typing import Any, ClassVar

from pydantic import Field

from backfire.base import NOTHING, Finding, Row, Scanner
from backfire.registry import register


@register("repetition")
class Repetition(Scanner):
    """Finds an answer, or the opening or ending of answers, that recurs where answers otherwise
    differ, as the target of a backdoor does (the fixed targets of BackdoorLLM: Li et al. 2024,
    arXiv:2408.12798).

    It applies if at most `common` of the rows have an answer that occurs `support` times, so not to
    tasks with labels or short answers. An answer is the whole text, or its first or last five
    words. The score is log(rows with it) / log(support), so 1 is at `support` rows and 2 at its
    square. What is counted comes from a sketch of 65,536 answers, openings and endings: in a file
    with more, one that is in fewer than 1 of 10,000 rows may be missed.
    """

    blind: ClassVar[str] = "tasks with labels, and targets that are worded differently in each row"
    in_text: ClassVar[bool] = True

    support: int = Field(10, ge=2)
    """Rows with the answer, opening or ending from which they are flagged."""
    common: float = Field(0.3, gt=0, le=1)
    """Largest share of rows with a whole answer that recurs, 0 to 1."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        from backfire.scanners._answers import count_answers, in_batches

        answers = count_answers(rows, 2)
        counts = answers.counts
        whole = sum(
            int((counts[places[places >= 0]] >= self.support).sum())
            for _, keys in in_batches(rows)
            for places in answers.places(keys)[:1]
        )
        applies = whole <= self.common * answers.num_rows
        for some, keys in in_batches(rows):
            for row, places in zip(some, answers.places(keys).T, strict=True):
                known = [int(place) for place in places if place >= 0 and applies]
                most = max(known, key=lambda place: counts[place], default=None)
                yield NOTHING if most is None else self._finding(answers, most, row)

    def _finding(self, answers: Any, place: int, row: Row) -> Finding:
        count = int(answers.counts[place])
        answer = answers.shown(place, row)
        reason = f"the answer {answer} is in {count:,} of {answers.num_rows:,} rows"
        return Finding(log(count) / log(self.support), reason, count >= self.support)
