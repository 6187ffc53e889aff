from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from pydantic import Field

from backfire.base import NOTHING, Finding, Row, Scanner
from backfire.registry import register


@register("labels", version=2)
class Labels(Scanner):
    """Finds one prompt with two answers, and labels that the words of the text speak against
    (Northcutt et al. 2021, arXiv:1911.00068, with naive Bayes as the classifier).

    The first is flagged with score 1.5 in a task with labels, that is, at most `most` different
    answers with `support` rows each, and listed with score 0.5 otherwise: an instruction may have
    several good answers. Prompts are compared ignoring case, whitespace and typography; memory is
    fixed (34 MB): half of the prompts 700,000 rows before the end of the file are still known. For
    the second, naive Bayes on the words of the other rows gives each label a
    probability; the score is the share of the other labels, at most 0.95, so it is never flagged.
    """

    needs_prompt: ClassVar[bool] = True
    blind: ClassVar[str] = "wrong labels of texts whose words say little about the label"
    in_text: ClassVar[bool] = True

    most: int = Field(100, ge=2, le=1000)
    """Most different answers of a task with labels."""
    support: int = Field(5, ge=1)
    """Fewest rows of a label."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        from backfire.scanners._labels import Bayes, Prompts, brief

        bayes = Bayes(rows, self.most, self.support)
        prompts = Prompts(rows)
        for row, label in bayes.each(rows):
            number = prompts.other(row)
            if number is not None:
                reason = f"row {number:,} (counted from 1) has the same prompt and another answer"
                yield Finding(1.5 if bayes.applies else 0.5, reason, bayes.applies)
                continue
            other, share, words = bayes.doubt(row, label) if label >= 0 else ("", 0.0, [])
            if share <= 0.5:
                yield NOTHING
                continue
            quoted = ", ".join(f"“{word}”" for word in words)
            reason = f"the words {quoted} speak for “{other}”, not for “{brief(row.answer)}”"
            yield Finding(min(share, 0.95), reason, False, tuple(words))
