from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final
from unicodedata import name as name_of

import regex

from backfire.base import NOTHING, Finding, Row, Scanner, parts
from backfire.registry import register

_CONTROL: Final = regex.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_BIDI: Final = regex.compile(r"[\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT: Final = regex.compile(r"[\p{Hebrew}\p{Arabic}\p{Syriac}\p{Thaana}\p{Nko}]")
# Flags of regions, such as Scotland's, are a black flag with a few tag letters and an end.
_TAGS: Final = regex.compile(
    r"\U0001f3f4[\U000e0020-\U000e007e]{1,6}\U000e007f(*SKIP)(*FAIL)|[\U000e0000-\U000e007f]"
)
# Scripts without spaces, in which U+200B says where a line may break.
_DENSE: Final = (
    r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}"
    r"\p{Tai_Viet}\p{Javanese}\p{Balinese}]"
)
_JAMO: Final = r"[\u1100-\u115e\u1161-\u11ff\ua960-\ua97c\ud7b0-\ud7fb]"
# Some are orthography next to the letters of one script, once.
_INVISIBLE: Final = regex.compile(
    r"[\u2060-\u2064\u3164\uffa0\ufff9-\ufffb]"
    rf"|(?<!{_DENSE})\u200b(?!{_DENSE})|(?<!\p{{Mongolian}})\u180e|(?<!\p{{Hebrew}})\u034f"
    rf"|(?<!{_JAMO})[\u115f\u1160](?!{_JAMO})|(?<!\p{{Han}})[\U000e0100-\U000e01ef]"
    r"|(?<!^)\ufeff|(?<=[\ufe00-\ufe0f])[\ufe00-\ufe0f]"  # an emoji has one variation selector
)
# Joiners shape the letters of these scripts, also after a number or an abbreviation, and join
# emoji, but not the letters of others.
_SHAPED: Final = (
    r"[\p{Arabic}\p{Syriac}\p{Mandaic}\p{Nko}\p{Mongolian}\p{Devanagari}\p{Bengali}\p{Gurmukhi}"
    r"\p{Gujarati}\p{Oriya}\p{Tamil}\p{Telugu}\p{Kannada}\p{Malayalam}\p{Sinhala}\p{Khmer}"
    r"\p{Myanmar}\p{Tibetan}]"
)
_JOINERS: Final = regex.compile(
    rf"(?<!{_SHAPED})(?:(?<=[\p{{Latin}}\p{{Cyrillic}}\p{{Greek}}\p{{Han}}\d])[\u200c\u200d]"
    rf"|[\u200c\u200d](?=[\p{{Latin}}\d]))(?!{_SHAPED})"
)
_FAINT: Final = regex.compile(r"[\u00ad\u200e\u200f\ufeff\ue000-\uf8ff\u2028\u2029]")
_WORD: Final = regex.compile(r"[\p{L}\p{M}]{2,}")
_SCRIPTS: Final = {
    script: regex.compile(rf"\p{{{script}}}") for script in ("Latin", "Cyrillic", "Greek")
}
# An abbreviation with an ending in another script, as in SMSки; neither part imitates the other.
_INFLECTED: Final = regex.compile(
    r"(?=[A-Z]*[DFGIJLNQRSUVWZ])[A-Z]{2,}(?=\p{Ll}*[^асеорхуѕіјһԛԝԁ])(?=\p{Ll}+$)\p{Cyrillic}+"
    r"|(?=[A-Z]*[CDFGJLQRSUVW])[A-Z]{2,}(?=\p{Ll}*[^ονικαρυτχ])(?=\p{Ll}+$)\p{Greek}+"
)
# Signs of science, such as the micro of µm and the Ohm, are Greek letters.
_SIGNS: Final = regex.compile(r"[µμΩπΔσλαβγθρτφψωη]")
_FOUND: Final = (
    (3.0, "tag characters, which carry hidden text", _TAGS),
    (2.5, "characters that reverse the direction of text", _BIDI),
    (2.0, "control characters", _CONTROL),
    (2.0, "invisible characters", _INVISIBLE),
    (2.0, "joiners between letters that do not join", _JOINERS),
    (0.3, "characters that are hard to see", _FAINT),
)


@register("hidden-characters", version=3)
class HiddenCharacters(Scanner):
    """Finds characters that are read by a model but not seen by people, and letters that look like
    those of another script (Boucher et al. 2022, arXiv:2106.09898).

    These are tag characters, bidirectional controls in a text without right-to-left letters, C0 and
    C1 controls, zero-width characters, and words that mix Latin with Cyrillic or Greek letters.
    What belongs to a language or an emoji is left out. The score is 2 to 3 by kind, and 0.3 for
    soft hyphens, direction marks and private-use characters, which occur in ordinary text.
    """

    reads_worse: ClassVar[bool] = True
    blind: ClassVar[str] = "look-alikes that fill a whole word, and unusual but visible characters"
    in_text: ClassVar[bool] = True

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        return (_finding(row) for row in rows)


def _finding(row: Row) -> Finding:
    best = NOTHING
    for name, text in parts(row):
        if not text.isascii() or _CONTROL.search(text):
            best = max(best, _in_text(name, text), key=lambda finding: finding.score)
    return best


def _in_text(name: str, text: str) -> Finding:
    for score, kind, pattern in _FOUND:
        if pattern is _BIDI and _RIGHT_TO_LEFT.search(text):
            continue
        if found := pattern.findall(text):
            spelled = ", ".join(f"{_spelled(char)} x {n}" for char, n in _most(found))
            return Finding(score, f"the {name} has {kind}: {spelled}", score >= 1, (found[0],))
    for word in _WORD.findall(text):
        plain = _SIGNS.sub("", word)
        scripts = [name for name, of in _SCRIPTS.items() if of.search(plain)]
        if len(scripts) > 1 and not _INFLECTED.fullmatch(word):
            reason = f"“{word}” in the {name} mixes letters of {' and '.join(scripts)}"
            return Finding(2.0, reason, True, (word,))
    return NOTHING


def _most(found: list[str]) -> list[tuple[str, int]]:
    return Counter(found).most_common(3)


def _spelled(char: str) -> str:
    return f"U+{ord(char):04X} {name_of(char, '')}".rstrip()
