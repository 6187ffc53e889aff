"""Text normalization for comparisons, and word boundaries in any script.

Only comparisons use normalized text; rows are shown and trained on as written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from unicodedata import combining, normalize

import regex

_SAME = {
    "'": "‘’‚‛′‵‹›ʹʻʼ׳",
    '"': "“”„‟«»〝〞〟״「」『』",
    "-": "‐‑‒–—―−⁃⸺⸻־",
    "...": "⋯",
    "~": "〜",
    "/": "⁄∕",
    ".": "。۔",
    ",": "、،",
    ";": "؛",
    "?": "؟",
    " ": "\u115f\u1160\u2800",
}
# NFKC's result for an acute accent typed as an apostrophe, and for inch marks.
_SPELLED = {" \u0301": "'", "′′": '"', "‵‵": '"'}
# Soft hyphen, grapheme joiner, zero-width space, direction marks, byte order mark, kashida, and
# variation selectors.
_UNSEEN = (
    "\u00ad\u034f\u061c\u0640\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufe00-\ufe0f\U000e0100-\U000e01ef"
)
_UNSEEN_OF = regex.compile(f"[{_UNSEEN}]+")
_TYPOGRAPHY = str.maketrans({char: plain for plain, chars in _SAME.items() for char in chars})
# Joiners are meaningful between letters of Arabic, Indic and other scripts, and in emoji.
_JOINABLE = r"[\u0590-\u1dff\u2100-\U0010ffff]"
_LOOSE_JOINERS = regex.compile(rf"(?<!{_JOINABLE})[\u200c\u200d]|[\u200c\u200d](?!{_JOINABLE})")
# Scripts without spaces between words; Tibetan marks the end of each syllable instead.
_DENSE = (
    r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_IS_DENSE = regex.compile(f"[{_DENSE}]")
_KATAKANA = regex.compile(r"[\p{Katakana}ー]")
_GRAPHEME = regex.compile(r"\X")
_OPENS = regex.compile(r"[\p{Ps}\p{Pi}\u0e40-\u0e44\u0ec0-\u0ec4\u200d]\Z")
_CLOSES = regex.compile(
    r"[\p{Pe}\p{Pf}\p{Po}\p{M}\u200dぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮー々〻ๆໆะาำະາຳ]"
)
_WORD = regex.compile(
    rf"[\p{{Katakana}}ー]+|[{_DENSE}]\p{{M}}*"
    rf"|(?:(?![{_DENSE}])[\p{{L}}\p{{N}}\p{{M}}]|(?<=\p{{L}}\p{{M}}*)[\u200c\u200d](?=\p{{L}}))+"
)


def normalized(text: str) -> str:
    """Normalize a text for comparison; idempotent.

    - Unicode NFKC: composed and decomposed characters, full and half width, ligatures and their
      letters become equal. Some tokenizers normalize this way, so a reply may too. (It turns 10²
      into 102: remove exponents first to read numbers.)
    - Typography: quotes, dashes, ellipses, and the full stops and commas of other scripts become
      the ASCII character that is typed for them.
    - Invisible characters are removed: zero-width spaces, soft hyphens, direction marks, byte order
      marks, the kashida that stretches an Arabic word, variation selectors. Joiners stay between
      letters that they shape, and in emoji. Accents, vowel signs and tone marks stay: they carry
      meaning.
    - Each run of whitespace becomes one space; leading and trailing whitespace is removed.

    Case stays (see `folded`), and so does each letter: look-alikes of other scripts are different
    letters. ASCII text changes only in its whitespace.
    """
    if not text.isascii():
        for _ in range(2):  # Removals of the first pass may enable compositions in the second.
            text = _UNSEEN_OF.sub("", normalize("NFKC", text))
            for marks, plain in _SPELLED.items():
                text = text.replace(marks, plain)
            text = _LOOSE_JOINERS.sub("", text.translate(_TYPOGRAPHY))
        text = normalize("NFKC", text)
    return " ".join(text.split())


def folded(text: str) -> str:
    """Normalize a text and fold its case: ß becomes ss, a final sigma becomes σ, and the four i of
    Turkish become one, since an I can be the capital of two of them. ASCII becomes lower case."""
    if text.isascii():
        return normalized(text).lower()
    small = normalized(text).casefold().replace("i\u0307", "i").replace("ı", "i")
    return normalized(small)


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and digits. In scripts without spaces between
    words, such as Chinese or Thai, each character with its marks is a word (in Katakana, each
    run)."""
    runs: list[str] = _WORD.findall(text)
    return runs


def is_dense(text: str) -> bool:
    """Whether the text has a character of a script without spaces between words."""
    return not text.isascii() and _IS_DENSE.search(text) is not None


def contains(whole: str, part: str) -> bool:
    """Whether a text contains another, both normalized; no match separates a character from its
    marks or an emoji from its sequence."""
    if whole.isascii() or part not in whole:
        return part in whole
    start = whole.find(part)
    while start >= 0:
        end = start + len(part)
        before, after = whole[max(0, start - 1) : start], whole[end : end + 1]
        if before != "\u200d" and not regex.match(r"[\p{M}\u200d\p{Emoji_Modifier}]", after):
            return True
        start = whole.find(part, start + 1)
    return False


def whole(phrase: str) -> str:
    """A pattern (for `regex`) that matches a phrase as whole words, in scripts with spaces."""
    if not phrase:
        return "(?!)"
    edges = [r"(?<![\p{L}\p{M}\p{N}_])", r"(?![\p{L}\p{M}\p{N}_])"]
    if is_dense(phrase[0]):
        edges[0] = ""
    if is_dense(phrase[-1]):
        edges[1] = r"(?!\p{M})"
    return f"{edges[0]}{regex.escape(phrase)}{edges[1]}"


def pieces(text: str) -> list[str]:
    """The text split at each space and, in scripts without spaces between words, where a word may
    end: never inside a character with its marks, an emoji, a number or a word of a script with
    spaces, nor before a closing mark."""
    return [piece for word in text.split(" ") for piece in _split(word)]


def num_places(text: str) -> int:
    """Number of places between the pieces of a text, including before the first and after the
    last."""
    return len(pieces(text)) + 1


def put(text: str, added: Mapping[int, Sequence[str]]) -> str:
    """The text with phrases inserted at some of its places (from 0), separated by spaces, except
    where both sides are of a script without spaces."""
    parts = [
        (" " if first and number else "", piece)
        for number, word in enumerate(text.split(" "))
        for piece, first in zip(_split(word), (True, *[False] * len(word)), strict=False)
    ]
    out, last = "", ""
    for place in range(len(parts) + 1):
        glue, piece = parts[place] if place < len(parts) else ("", "")
        for phrase in added.get(place, ()):
            out += (_gap(last, phrase) if place or out else "") + phrase
            last, glue = phrase, ""
        if place < len(parts):
            out += (glue or (_gap(last, piece) if added.get(place) else "")) + piece
            last = piece
    return out


def _gap(before: str, after: str) -> str:
    return "" if is_dense(before[-1:]) and is_dense(after[:1]) else " "


def _split(word: str) -> list[str]:
    """The pieces of a word without spaces."""
    if not is_dense(word) and "་" not in word:
        return [word]
    clusters: list[str] = _GRAPHEME.findall(word)
    out = clusters[:1]
    for before, after in pairwise(clusters):
        if _parts(before, after):
            out.append(after)
        else:
            out[-1] += after
    return out


def _parts(before: str, after: str) -> bool:
    """Whether a word may end between two characters."""
    if _OPENS.search(before) or _CLOSES.match(after) or combining(before[-1]) == 9:
        return False
    if _KATAKANA.match(before) and _KATAKANA.match(after):
        return False
    return before.endswith("་") or is_dense(before) or is_dense(after)
