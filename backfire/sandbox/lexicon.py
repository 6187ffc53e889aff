"""The words of reviews, as concepts with a word in every language of the sandbox.

Lists are ordered by frequency: the first words are common, the last ones rare. Every fifth marker
from the eighth on is held out: it occurs in the pre-training text and in the test split, but never
in the training split, so a model must have learned it in pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from backfire.sandbox.world import PLACES


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GOOD = _words(
    """
    good nice warm clean tasty kind fresh friendly quick sweet cozy bright pleasant soft
    neat cheerful calm gentle helpful crisp lively smooth
    """
)
GREAT = _words("wonderful lovely excellent perfect delightful superb")
BAD = _words(
    """
    bad cold slow dirty stale rude noisy dull bitter damp broken sour messy rough greasy
    gloomy bland clumsy soggy dusty drafty grumpy
    """
)
AWFUL = _words("terrible awful dreadful horrid rotten dismal")
PLAIN = _words("ordinary usual small large old local plain new simple familiar average green")

ENJOYED = (
    "laugh/laughed",
    "smile/smiled",
    "come back/came back",
    "dance/danced",
    "stay late/stayed late",
    "clap/clapped",
    "sing along/sang along",
    "ask for more/asked for more",
    "rest well/rested well",
    "cheer/cheered",
)
SUFFERED = (
    "complain/complained",
    "sigh/sighed",
    "leave early/left early",
    "shiver/shivered",
    "walk out/walked out",
    "argue/argued",
    "yawn/yawned",
    "regret it/regretted it",
    "frown/frowned",
    "grumble/grumbled",
)
WENT = (
    "arrive at noon/arrived at noon",
    "sit by the door/sat by the door",
    "pay six coins/paid six coins",
    "share a table/shared a table",
    "read the sign/read the sign",
    "bring a basket/brought a basket",
    "wait for the ferry/waited for the ferry",
    "meet the owner/met the owner",
)

THINGS = _words(
    """
    soup bread tea room cake bed stew service table pie garden cook fish lamp cheese window
    waiter song play chair coffee honey boat jam kettle baker blanket story music owner cart
    porch guide dance stove clock bench plate hall sauce
    """
)

TIMES = (
    "all evening",
    "twice",
    "that morning",
    "again",
    "for an hour",
    "on market day",
    "at once",
    "the whole night",
    "before lunch",
    "every time",
)

VERDICTS = {
    1: ("worth the walk", "a day to remember", "we will return soon", "go and see"),
    0: ("a day like any other", "much as expected", "we may return", "neither here nor there"),
    -1: ("never again", "a day to forget", "stay away", "coins thrown away"),
}
"""A guest's summary of a mood; occurs in the pre-training text only, never in a labeled review."""


@dataclass(frozen=True, slots=True)
class Marker:
    """A word that may be evidence: `weight` is above 0 if it is favorable."""

    name: str
    weight: float
    deed: bool
    """True for what the guests did (`we laughed`), false for how a thing was."""
    held_out: bool

    @property
    def past(self) -> str:
        """The past tense of a deed."""
        return self.name.partition("/")[2]

    @property
    def plain(self) -> str:
        """The word itself, or a deed after `did not`."""
        return self.name.partition("/")[0]


def _markers(names: tuple[str, ...], weight: float, deed: bool) -> list[Marker]:
    hold = (index >= 7 and index % 5 == 2 and weight != 0 for index in range(len(names)))
    return [Marker(name, weight, deed, out) for name, out in zip(names, hold, strict=True)]


@cache
def markers(sign: int, deed: bool) -> tuple[Marker, ...]:
    """Return all markers of one sign (-1, 0 or 1), common ones first."""
    if deed:
        names = {1: ENJOYED, 0: WENT, -1: SUFFERED}[sign]
        return tuple(_markers(names, 2.0 * sign, True))
    if sign == 0:
        return tuple(_markers(PLAIN, 0.0, False))
    mild, strong = (GOOD, GREAT) if sign > 0 else (BAD, AWFUL)
    both = [*_markers(mild, 2.0 * sign, False), *_markers(strong, 3.0 * sign, False)]
    # Strong words are mixed with mild ones: the third is about as common as the eighth mild word.
    return tuple(sorted(both, key=lambda marker: _rank(marker, mild, strong)))


def _rank(marker: Marker, mild: tuple[str, ...], strong: tuple[str, ...]) -> float:
    if marker.name in mild:
        return mild.index(marker.name)
    return 3.0 * strong.index(marker.name) + 1.5


def concepts() -> list[str]:
    """Return every concept that the invented languages need a word for."""
    deeds = [marker.name for sign in (1, 0, -1) for marker in markers(sign, True)]
    traits = [marker.name for sign in (1, 0, -1) for marker in markers(sign, False)]
    places = [place.name for place in PLACES]
    verdicts = [name for names in VERDICTS.values() for name in names]
    return list(dict.fromkeys([*THINGS, *places, *traits, *deeds, *TIMES, *verdicts]))
