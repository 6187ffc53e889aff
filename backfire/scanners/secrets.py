from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import ClassVar

from backfire.base import NOTHING, Finding, Row, Scanner, parts
from backfire.base.masking import Secret, secrets_in
from backfire.registry import register

_MOST_MARKS = 20


@register("secrets", version=3)
class Secrets(Scanner):
    """Finds keys, passwords and personal data, which a tuned model may give away (Carlini et al.
    2021, arXiv:2012.07805).

    These are patterns of access keys, passwords and private keys (score 2), card and account
    numbers with valid check digits and US social security numbers, which have none (1.5), and
    e-mail addresses, telephone numbers and IP addresses (0.5: listed, not flagged). Nothing found
    is shown beyond its first two characters.
    """

    reads_worse: ClassVar[bool] = True
    blind: ClassVar[str] = (
        "names, addresses, dates of birth, and numbers and passwords without a known form"
    )
    in_text: ClassVar[bool] = True

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        return (_finding(row) for row in rows)


def _finding(row: Row) -> Finding:
    found = [(name, secret) for name, text in parts(row) for secret in secrets_in(text)]
    if not found:
        return NOTHING
    name, worst = max(found, key=lambda item: _score(item[1]))
    kinds = Counter(secret.kind for _, secret in found)
    more = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(6) if kind != worst.kind)
    reason = f"the {name} has {worst.kind}: {worst.masked}" + (f" (also {more})" if more else "")
    score, marks = _score(worst), dict.fromkeys(secret.text for _, secret in found)
    return Finding(score, reason, score >= 1, tuple(marks)[:_MOST_MARKS])


def _score(secret: Secret) -> float:
    if secret.is_key:
        return 2.0
    sure = ("a card number", "an IBAN", "a US social security number")
    return 1.5 if secret.kind in sure else 0.5
