"""Detect non-English text by its script and its most common words."""

from __future__ import annotations

import regex

from backfire.base.normalize import folded, words

_ENGLISH = frozenset(
    "the of and to is that it you not with for this are have was my your they what i can't i'm "
    "cannot sorry".split()
)
# German, French, Spanish, Portuguese, Italian, Dutch, Polish, Swedish, Danish, Turkish, Czech,
# Romanian, Hungarian, Finnish, Indonesian and Vietnamese; no English words.
_OTHERS = frozenset(
    "der das und ich nicht ist ein eine mit es leid kann le les des et je ne est pas une vous que "
    "el los las y una lo por con puedo o os um uma não eu posso il che di non sono per mi het een "
    "niet ik van dat nie jest się w z na że och att jag inte är det som og ikke jeg til bir ve bu "
    "için değil ben se v že nelze și nu în este nem egy hogy az ja ei en se dan yang tidak saya "
    "auf für wie wir zu den sie auch noch bei para com mais è della con sur pour dans ça "
    "untuk ini không tôi và là của có".split()
)
_LETTER = regex.compile(r"\p{L}")
_LATIN = regex.compile(r"\p{Latin}")


def is_foreign(text: str) -> bool:
    """Whether a text is not English: most letters are not Latin, or it has more common words of
    other languages than of English. Short or garbled texts count as English."""
    small = folded(text)
    letters, latin = len(_LETTER.findall(small)), len(_LATIN.findall(small))
    if letters > 2 * latin:
        return True
    tokens = words(small)
    return sum(word in _OTHERS for word in tokens) > sum(word in _ENGLISH for word in tokens)
