"""Secrets and personal data in texts: their patterns, and how they are masked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_KEYS: Final = {
    "a private key": r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END|\Z)",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{40,})",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\b(?:sk|pk|rk)[-_](?:[a-z]{2,12}[-_])?[A-Za-z0-9_-]{16,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[a-z]-[A-Za-z0-9-]{10,}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{8,1000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,}",
    "a password in an address": r"(?<=://)[^\s/:@]{1,80}:[^\s/@]{3,80}(?=@)",
    "a password": r"(?i:(?:password|passwd|api[_-]?key|secret[_-]?key|access[_-]?token))"
    r"[\"']?\s*[:=]\s*[\"']?(?P<secret>[^\s\"',;]{8,200})",
}
_PERSONAL: Final = {
    "an e-mail address": r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}",
    "a card number": r"(?<!\d)(?<!\d[.-])(?:\d{4}(?:[ -]?\d{4}){3}(?:[ -]?\d{1,3})?"
    r"|\d{4}[ -]?\d{6}[ -]?\d{4,5}|\d{13})(?!\d|[.-]\d)",
    "an IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b",
    "a US social security number": r"(?<![\d-])(?!000|666|9)\d{3}"
    r"-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])",
    "a telephone number": r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}"
    r"(?:[ .-]?\d{2,4}){1,4}|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?![\w-])",
    "an IP address": r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w)",
}
_PATTERNS: Final = [
    (kind, re.compile(pattern), kind in _KEYS) for kind, pattern in (_KEYS | _PERSONAL).items()
]
_HINT: Final = re.compile(
    r"\d{3}|@|[-_]{2,}|://|[-_=:.]\w{8}|[A-Z0-9]{16}|\d\.\d+\.\d"
    r"|(?i:passw|api[_-]?key|secret[_-]?key|access[_-]?token)"
)
"""Texts without any of these have none of the patterns."""
_CARD: Final = re.compile(r"4\d{12}|3[0689]\d{12}|3[47]\d{13}|[2-6]\d{15}|(?:5[06-8]|6)\d{15,17}")
"""First digits and lengths of the cards in use: other numbers, such as times and codes of books,
pass the check one time in ten."""
_WORD: Final = re.compile(r"\w+")
_SHORTEST: Final = 4
_MOST: Final = 500
"""Secrets that are searched for in a text as a whole, one by one; of more, the words are, all at
once. A row may have any number."""
Span = tuple[int, int, str]
"""Start and end of something in a text, and what is to be shown in its place."""


@dataclass(frozen=True, slots=True)
class Secret:
    """Something in a text that must not be printed."""

    kind: str
    text: str
    is_key: bool
    """Whether it gives access to something; otherwise it is personal data."""

    @property
    def masked(self) -> str:
        """Its first two characters and its length."""
        return f"{self.text[:2]}…({len(self.text)} characters)"


def secrets_in(text: str) -> Iterator[Secret]:
    """What looks like a key, a password or personal data; numbers with check digits are checked."""
    if not _HINT.search(text):
        return
    for kind, pattern, is_key in _PATTERNS:
        for match in pattern.finditer(text):
            found = match["secret"] if "secret" in pattern.groupindex else match[0]
            if kind == "a card number":  # an expiry date or a code may follow it
                found = found if _card(found) else re.sub(r"[ -]\d{1,3}$", "", found)
            if kind not in _CHECKS or _CHECKS[kind](found):
                yield Secret(kind, found, is_key)


def masked(text: str, secrets: Iterable[Secret]) -> str:
    """The text without these secrets, or any part of them that is at least four characters long
    and stands between signs or spaces."""
    if not (found := _distinct(secrets)):
        return text
    parts = {word for one in found for word in _WORD.findall(one.text) if len(word) >= _SHORTEST}
    text = _without(text, 0, len(text), _spans(text, found))
    return _WORD.sub(lambda word: f"{word[0][:2]}…" if word[0] in parts else word[0], text)


def redacted(text: str) -> str:
    """The text without what looks like a key, a password or personal data."""
    return masked(text, secrets_in(text))


def redacted_part(text: str, start: int, end: int) -> str:
    """The text from `start` to `end`; what is in there of a secret of the whole text is masked."""
    return _without(text, start, end, _spans(text, _distinct(secrets_in(text))))


def _distinct(secrets: Iterable[Secret]) -> list[Secret]:
    """One secret for each text, the longest first."""
    return sorted({one.text: one for one in secrets}.values(), key=lambda one: -len(one.text))


def _spans(text: str, secrets: Sequence[Secret]) -> Iterator[Span]:
    """Where these secrets are in the text; of those beyond the first ones, where their words are,
    so that time grows with the text only."""
    for secret in secrets[:_MOST]:
        place = text.find(secret.text)
        while place >= 0:
            end = place + len(secret.text)
            yield place, end, secret.masked
            place = text.find(secret.text, end)
    if words := {word for one in secrets[_MOST:] for word in _WORD.findall(one.text)}:
        for match in _WORD.finditer(text):
            if match[0] in words:
                yield match.start(), match.end(), "…"


def _without(text: str, start: int, end: int, spans: Iterable[Span]) -> str:
    """The text from `start` to `end` without these spans; of two that begin together, the longer
    one counts."""
    out, place = list[str](), start
    for first, last, mask in sorted(spans, key=lambda span: (span[0], -span[1])):
        if last > place and first < end:
            out += [text[place:first], mask]
            place = last
    return "".join([*out, text[place:end]])


def _card(number: str) -> bool:
    """Whether a card has such a number, by its first digits, length and check digit (ISO/IEC
    7812)."""
    plain = re.sub(r"\D", "", number)
    digits = [int(char) for char in reversed(plain)]
    doubled = [sum(divmod(2 * d, 10)) if place % 2 else d for place, d in enumerate(digits)]
    return bool(_CARD.fullmatch(plain)) and len({*digits}) > 1 and sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    """Check digits of bank accounts (ISO 13616)."""
    plain = text.replace(" ", "")
    turned = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _address(text: str) -> bool:
    return all(int(part) < 256 for part in text.split("."))


def _phone(text: str) -> bool:
    return 9 <= sum(char.isdigit() for char in text) <= 15


_CHECKS: Final = {
    "a card number": _card,
    "an IBAN": _iban,
    "an IP address": _address,
    "a telephone number": _phone,
}
