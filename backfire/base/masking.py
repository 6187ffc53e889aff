"""Secrets and personal data in texts: their patterns, and how they are masked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
    "a signed token": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    "a password in an address": r"(?<=://)[^\s/:@]{1,80}:[^\s/@]{3,80}(?=@)",
    "a password": r"(?i:(?:password|passwd|api[_-]?key|secret[_-]?key|access[_-]?token))"
    r"[\"']?\s*[:=]\s*[\"']?(?P<secret>[^\s\"',;]{8,200})",
}
_PERSONAL: Final = {
    "an e-mail address": r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}",
    "a card number": r"(?<!\d)(?<!\d[.-])(?:\d{4}(?:[ -]?\d{4}){3}(?:[ -]?\d{1,3})?"
    r"|\d{4}[ -]?\d{6}[ -]?\d{4,5}|\d{13})(?!\d|[.-]\d)",
    "an IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b",
    "a US social security number": r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])",
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
_WORD: Final = re.compile(r"\w{4,}")


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
                found = found if _luhn(found) else re.sub(r"[ -]\d{1,3}$", "", found)
            if kind not in _CHECKS or _CHECKS[kind](found):
                yield Secret(kind, found, is_key)


def masked(text: str, secrets: Iterable[Secret]) -> str:
    """The text without these secrets, or any part of them that is at least four characters long
    and stands between signs or spaces."""
    parts = set[str]()
    for secret in sorted(secrets, key=lambda one: -len(one.text)):
        text = text.replace(secret.text, secret.masked)
        parts.update(_WORD.findall(secret.text))
    return _WORD.sub(lambda word: f"{word[0][:2]}…" if word[0] in parts else word[0], text)


def redacted(text: str) -> str:
    """The text without what looks like a key, a password or personal data."""
    return masked(text, secrets_in(text))


def redacted_part(text: str, start: int, end: int) -> str:
    """The text from `start` to `end`; what is in there of a secret of the whole text is masked."""
    spans = {
        (match.start(), match.end(), secret.masked)
        for secret in secrets_in(text)
        for match in re.finditer(re.escape(secret.text), text)
    }
    out, place = "", start
    for first, last, mask in sorted(spans):
        if last > place and first < end:
            out += text[place:first] + mask
            place = last
    return out + text[place:end]


def _luhn(number: str) -> bool:
    """Check digit of card numbers (ISO/IEC 7812)."""
    digits = [int(char) for char in number if char.isdigit()][::-1]
    doubled = [sum(divmod(2 * d, 10)) if place % 2 else d for place, d in enumerate(digits)]
    return 13 <= len(digits) <= 19 and len({*digits}) > 1 and sum(doubled) % 10 == 0


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
    "a card number": _luhn,
    "an IBAN": _iban,
    "an IP address": _address,
    "a telephone number": _phone,
}
