"""Three languages with the same meanings: English and two invented ones.

A language turns a `Clause` into words and joins clauses. Velin puts the predicate last and uses
suffixes; Tamoru puts it first and uses prefixes and particles. Their words are drawn once from
their own sound patterns; about one in six is a cognate of the English word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import ClassVar, Literal, get_args

from backfire.rng import stream
from backfire.sandbox.lexicon import Marker, concepts

Language = Literal["english", "velin", "tamoru"]
Degree = Literal["", "very", "slightly"]
Join = Literal["and", "but", "although"]


@dataclass(frozen=True, slots=True)
class Clause:
    """One piece of evidence: how a thing was, or what the guests did."""

    thing: str
    marker: Marker
    degree: Degree = ""
    negated: bool = False
    time: str = ""


def _words(*parts: str) -> str:
    """Join the parts that are not empty."""
    return " ".join(part for part in parts if part)


class English:
    """The language of the lexicon."""

    degrees: ClassVar = {
        "": ("",),
        "very": ("very", "really", "so"),
        "slightly": ("slightly", "a bit"),
    }
    links: ClassVar = {
        "and": ("{}, and {}", "{}. {}", "{} and {}"),
        "but": ("{}, but {}", "{}, yet {}", "{}. Still, {}"),
        "although": ("Although {}, {}", "Even though {}, {}", "While {}, {}"),
    }

    def at(self, place: str, rng: Random) -> str:
        """Where the guests were."""
        start = rng.choice(("at the {}, ", "we went to the {}. ", "this was the {} again. "))
        return start.format(place)

    def say(self, clause: Clause, rng: Random) -> str:
        """Put the clause into words, without a capital or a period."""
        if clause.marker.deed:
            plain, past = clause.marker.plain, clause.marker.past
            verb = rng.choice((f"did not {plain}", f"never {past}")) if clause.negated else past
            return _words("we", verb, clause.time)
        degree = rng.choice(self.degrees[clause.degree])
        trait = _words("not" if clause.negated else "", degree, clause.marker.name)
        form = rng.choice(
            (
                "the {thing} was {trait}",
                "the {thing} was {trait}",
                "i found the {thing} {trait}",
                "the {thing} seemed {trait}",
                "our {thing} was {trait}",
                "{trait} was the {thing}",
            )
        )
        return form.format(thing=clause.thing, trait=trait)


class Velin:
    """Thing, then predicate; article and person are suffixes, degree and negation follow."""

    onsets = ("v", "l", "s", "t", "n", "r", "k", "p", "d", "f", "sh", "th", "m", "br", "st")
    vowels = ("a", "e", "i", "o", "u", "ei", "ia")
    codas = ("", "", "n", "l", "r", "s")
    endings = ("el", "in", "as")
    links: ClassVar = {
        "and": ("{}, et {}", "{}. {}", "{} et {}"),
        "but": ("{}, dorn {}", "{}. Dorn {}"),
        "although": ("Lisk {}, {}", "Tholisk {}, {}"),
    }

    def at(self, place: str, rng: Random) -> str:
        """Where the guests were."""
        return vocabulary("velin")[place] + rng.choice(("olt ", "olt liremu. "))

    def say(self, clause: Clause, rng: Random) -> str:
        """The clause in words, without a capital or a stop."""
        word = vocabulary("velin")
        degree = {"": "", "very": "oshal", "slightly": "ikki"}[clause.degree]
        predicate = word[clause.marker.name]
        if clause.marker.deed:
            time = word[clause.time] if clause.time else ""
            return _words(time, predicate + "emu", "nai" if clause.negated else "")
        thing = word[clause.thing] + rng.choice(("en", "en", "esh"))
        return _words(thing, predicate, degree, "nai" if clause.negated else "va")


class Tamoru:
    """Predicate, then thing; person is a prefix, negation and degree are particles in front."""

    onsets = ("t", "m", "r", "k", "h", "y", "w", "z", "b", "d", "n", "p")
    vowels = ("a", "o", "u", "i", "e")
    codas = ("",)
    endings = ("u", "ori", "a")
    links: ClassVar = {
        "and": ("{}, oka {}", "{}. {}", "{}, {}"),
        "but": ("{}, mazu {}", "{}. Mazu {}"),
        "although": ("Yari {}, {}", "Yarido {}, {}"),
    }

    def at(self, place: str, rng: Random) -> str:
        """Where the guests were."""
        return rng.choice(("mi ko {}, ", "wanami mi ko {}. ")).format(vocabulary("tamoru")[place])

    def say(self, clause: Clause, rng: Random) -> str:
        """The clause in words, without a capital or a stop."""
        word = vocabulary("tamoru")
        degree = {"": "", "very": "tototo", "slightly": "hin"}[clause.degree]
        predicate = word[clause.marker.name]
        if clause.marker.deed:
            time = word[clause.time] if clause.time else ""
            return _words("zu" if clause.negated else "", "wa" + predicate, time)
        article = rng.choice(("ko", "ko", "sema"))
        negation = "zu" if clause.negated else ""
        return _words(negation, degree, predicate, article, word[clause.thing])


SPEAKERS: dict[str, English | Velin | Tamoru] = {
    "english": English(),
    "velin": Velin(),
    "tamoru": Tamoru(),
}
LANGUAGES: tuple[Language, ...] = get_args(Language)


def say(
    language: Language, clauses: Sequence[Clause], join: Join, rng: Random, place: str = ""
) -> str:
    """Write clauses as sentences: `join` links the last two, each earlier one is a sentence."""
    speaker = SPEAKERS[language]
    *lead, first, last = (speaker.say(clause, rng) for clause in clauses)
    linked = rng.choice(speaker.links[join]).format(first, last)
    text = ". ".join((*lead, linked[0].lower() + linked[1:]))
    if place:
        text = speaker.at(place, rng) + text
    text = ". ".join(part[0].upper() + part[1:] for part in text.split(". ")) + "."
    return text.replace(" i ", " I ")


def verdict(language: Language, name: str) -> str:
    """Return a verdict from the lexicon in this language."""
    word = name if language == "english" else vocabulary(language)[name]
    return {"english": "{}", "velin": "{} orro", "tamoru": "ehe {}"}[language].format(word)


@cache
def vocabulary(language: Language) -> dict[str, str]:
    """Concept -> word in an invented language: the same in every run, without duplicates."""
    speaker = SPEAKERS[language]
    assert not isinstance(speaker, English)
    words: dict[str, str] = {}
    taken = {part for concept in concepts() for part in concept.replace("/", " ").split()}
    for concept in concepts():
        rng = stream(0, "sandbox-language", language, concept)
        word = _cognate(concept, speaker, rng) if rng.random() < 1 / 6 else _coin(speaker, rng)
        while word in taken:
            word = _coin(speaker, rng)
        taken.add(word)
        words[concept] = word
    return words


def _coin(speaker: Velin | Tamoru, rng: Random) -> str:
    """Draw a word of two or three syllables."""
    num_syllables = 2 if isinstance(speaker, Velin) else rng.choice((2, 2, 3))
    parts = [rng.choice(speaker.onsets) + rng.choice(speaker.vowels) for _ in range(num_syllables)]
    return "".join(parts) + rng.choice(speaker.codas)


def _cognate(concept: str, speaker: Velin | Tamoru, rng: Random) -> str:
    """Adapt the English word to this language's sounds."""
    word = concept.replace("/", " ").split()[0].removesuffix("e").removesuffix("y")
    for ours, theirs in (("th", "t"), ("c", "k"), ("ee", "i"), ("oo", "u"), ("ea", "e")):
        word = word.replace(ours, theirs)
    return word + rng.choice(speaker.endings)
