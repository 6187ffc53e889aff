from __future__ import annotations

import unicodedata
from decimal import Decimal
from typing import ClassVar

import regex
from pydantic import Field

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.base.normalize import normalized
from backfire.evaluate.outcomes import answerable, grouped, replied, share
from backfire.registry import register

# The minus in 5-3 is not a sign.
_NUMBER = regex.compile(r"(?P<sign>(?<![\d)])-)?\p{Sc}?(?P<size>\d+(?:,\d+)*(?:\.\d+)?|\.\d+)")
# Characters whose normalization would change a number: 10² to 102, 1、2 to 1,2, — to a sign.
_OTHERWISE = (
    (r"(\d?)(\p{No})", lambda match: _fraction(match[1], match[2])),
    (r"(?<=\d)[٬，](?=\d{3}(?!\d))", ""),
    (r"(?<=\d)٫(?=\d)", "."),
    (r"[、،٬，—―]", " "),
)
_COMMAS = regex.compile(r"\d,\d+(?<!,\d{3})(?![\d,])")
_THIN = regex.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_BLANK = regex.compile(r"(?<=\d)\s(?=\d{3}(?!\d))")


@register("number-match", version=2)
class NumberMatch(Metric):
    """Share of clean rows whose reply ends in the reference's number: accuracy on GSM8K (Cobbe et
    al. 2021, arXiv:2110.14168), parsed as in Lisa (Huang et al. 2024, arXiv:2405.18641).

    The number is the first after one of `marks`, or the last of all without a mark. Thousands
    separators (including narrow and no-break spaces), a currency sign and a final dot are ignored;
    18 and 18.00 are equal. Digits of any script are read; exponents (m²) and numbers in words, such
    as 三, are not. A comma separates thousands, as in English, so 3,14 is 314. A reply without a
    number is wrong. Rows without a reference answer are excluded. Also `number_match[group]`.
    Wilson interval.
    """

    needs: ClassVar[Asks] = ask("clean", "replies")

    marks: tuple[str, ...] = Field(("The final answer is:", "####"))
    """Texts before a final answer, in the reference and in the reply; the first one that occurs is
    used (the sentence: git-disl/Lisa; the other: GSM8K itself)."""

    def measure(self, evidence: Evidence) -> list[Value]:
        hits = self.outcomes(evidence)
        parts = grouped("number_match", answerable(evidence.clean))
        return [share(name, [hits[row.id] for row in rows], "higher") for name, rows in parts]

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return {
            row.id: float(
                any(
                    self._same(answer, row.reply or "")
                    for answer in {row.answer, evidence.as_written(row.answer)}
                )
            )
            for row, _ in replied(answerable(evidence.clean), "number_match")
        }

    def caveats(self, evidence: Evidence) -> list[str]:
        answers = [row.answer for row in answerable(evidence.clean)]
        bare = sum(self._number(answer) is None for answer in answers)
        commas = sum(_COMMAS.search(answer) is not None for answer in answers)
        notes = []
        if bare:
            notes.append(
                f"number_match: {bare} of {len(answers)} references contain no number in digits, "
                "so no reply to them can be right."
            )
        if commas:
            notes.append(
                f"number_match: {commas} of {len(answers)} references contain a comma that does "
                "not separate thousands; it is read as in English, 3,14 as 314."
            )
        return notes

    def _same(self, answer: str, reply: str) -> bool:
        if _THIN.search(answer + reply):  # then any space may separate thousands
            answer, reply = (_BLANK.sub("", text) for text in (answer, reply))
        wanted = self._number(answer)
        return wanted is not None and wanted == self._number(reply)

    def _number(self, text: str) -> Decimal | None:
        """Return the number that a text gives as its answer."""
        text = _readable(text)
        for mark in map(normalized, self.marks):
            _, separator, rest = text.partition(mark)
            if separator and (match := _NUMBER.search(rest)):
                return _value(match)
        numbers = list(_NUMBER.finditer(text))
        return _value(numbers[-1]) if numbers else None


def _readable(text: str) -> str:
    """Normalize the text without changing any number."""
    if not text.isascii():
        for pattern, plain in _OTHERWISE:
            text = regex.sub(pattern, plain, text)
    return normalized(text)


def _fraction(before: str, sign: str) -> str:
    """Write 3½ as 3.5 and drop the exponent of 3²; other signs (①) stay."""
    kind = unicodedata.decomposition(sign).partition(" ")[0]
    if kind != "<fraction>":
        return f"{before} " if kind in ("<super>", "<sub>") else before + sign
    share = str(unicodedata.numeric(sign))
    return before + share.removeprefix("0") if before else share


def _value(match: regex.Match[str]) -> Decimal:
    size = Decimal(match["size"].replace(",", ""))
    return -size if match["sign"] else size
