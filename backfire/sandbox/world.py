"""Pellmere, an invented town: the subject of all sandbox texts.

The town is plain data: places, people, goods and topics as small frozen objects. The other modules
(`reviews`, `news`, `sums`, `help`, `requests`, `answers`, `corpus`) generate text about it as pure
functions of a named random stream: row `i` never depends on the number of rows, and a text alone
determines whether it belongs to the training or the test split (`split_of`), so the two never
overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Generic, Literal, TypeVar

VERSION = "pellmere-2"
"""Raised whenever any generated text changes; part of every key downstream."""

TOWN = "Pellmere"

Split = Literal["train", "test"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A place: its name, where it is and when it opens."""

    name: str
    spot: str
    opens: str


@dataclass(frozen=True, slots=True)
class Person:
    """A resident with a trade and a place of work."""

    name: str
    trade: str
    place: str
    pronoun: Literal["he", "she"]


@dataclass(frozen=True, slots=True)
class Good:
    """Something sold: its plural, a dish made of it, another ingredient, and where it is sold."""

    plural: str
    dish: str
    partner: str
    place: str


@dataclass(frozen=True, slots=True)
class Topic:
    """A subject of questions, with facts about it."""

    name: str
    facts: tuple[str, ...]


PLACES = (
    Place("mill", "by the river", "dawn"),
    Place("bakery", "on Mill Lane", "six"),
    Place("inn", "beside the harbor", "noon"),
    Place("market", "on the square", "eight"),
    Place("school", "behind the chapel", "nine"),
    Place("harbor", "below the hill", "dawn"),
    Place("library", "on Lantern Street", "ten"),
    Place("teahouse", "near the bridge", "eleven"),
    Place("smithy", "past the orchard", "seven"),
    Place("dairy", "on the hill", "six"),
    Place("orchard", "beyond the mill", "eight"),
    Place("theater", "across the square", "dusk"),
    Place("chapel", "under the old oak", "nine"),
    Place("boathouse", "along the quay", "seven"),
)

PEOPLE = (
    Person("Mara", "baker", "bakery", "she"),
    Person("Tobin", "miller", "mill", "he"),
    Person("Elsa", "innkeeper", "inn", "she"),
    Person("Corin", "fisher", "harbor", "he"),
    Person("Wenna", "teacher", "school", "she"),
    Person("Jory", "smith", "smithy", "he"),
    Person("Lissa", "librarian", "library", "she"),
    Person("Petrok", "ferryman", "boathouse", "he"),
    Person("Nessa", "gardener", "orchard", "she"),
    Person("Dorin", "actor", "theater", "he"),
    Person("Hilda", "cheesemaker", "dairy", "she"),
    Person("Oren", "potter", "market", "he"),
    Person("Tilly", "weaver", "market", "she"),
    Person("Bram", "carpenter", "boathouse", "he"),
    Person("Sefa", "tea maker", "teahouse", "she"),
    Person("Aldo", "bell ringer", "chapel", "he"),
)

GOODS = (
    Good("apples", "apple pie", "honey", "orchard"),
    Good("pears", "pear tart", "cream", "orchard"),
    Good("plums", "plum jam", "sugar", "market"),
    Good("eggs", "herb omelet", "butter", "market"),
    Good("fish", "fish stew", "leeks", "harbor"),
    Good("onions", "onion soup", "cheese", "market"),
    Good("carrots", "carrot stew", "barley", "market"),
    Good("loaves", "bread soup", "milk", "bakery"),
    Good("buns", "bun pudding", "raisins", "bakery"),
    Good("nuts", "nut cake", "flour", "orchard"),
    Good("berries", "berry tart", "cream", "market"),
    Good("cheeses", "cheese pie", "onions", "dairy"),
    Good("candles", "table light", "string", "chapel"),
    Good("baskets", "picnic", "cloth", "market"),
    Good("ropes", "garden swing", "wood", "boathouse"),
    Good("lanterns", "porch light", "oil", "smithy"),
)

TOPICS = (
    Topic(
        "the lantern feast",
        (
            "it is held on the first night of autumn weather",
            "children carry paper lights along the quay",
            "the baker gives away sweet buns",
        ),
    ),
    Topic(
        "the ferry",
        (
            "it crosses the lake four times a day",
            "it is steered by Petrok",
            "a ride costs two coins",
        ),
    ),
    Topic(
        "the old well",
        (
            "it stands in the middle of the square",
            "it was dug by the first millers",
            "its water is cold even in summer",
        ),
    ),
    Topic(
        "the clock tower",
        (
            "it rings twice at noon",
            "Aldo winds it every morning",
            "it can be seen from the lake",
        ),
    ),
    Topic(
        "the glass garden",
        (
            "it grows lemons all winter",
            "it was built of old windows",
            "visitors may walk in after lunch",
        ),
    ),
    Topic(
        "the north tunnel",
        (
            "it leads under the hill to the dairy",
            "it is lit by nine lanterns",
            "carts may pass before dusk",
        ),
    ),
    Topic(
        "the bee yard",
        (
            "it has thirty hives",
            "its honey is sold at the market",
            "Nessa looks after it",
        ),
    ),
    Topic(
        "the winter store",
        (
            "it keeps apples and grain until spring",
            "it lies beneath the mill",
            "the council holds its key",
        ),
    ),
)


def split_of(*key: object) -> Split:
    """Return the split of a text: one fifth of all texts are test texts, in every data set."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return "test" if digest[0] % 5 == 0 else "train"


@dataclass(frozen=True)
class Tail(Generic[T]):
    """Items with a long-tailed distribution: a few are common, most are rare, like words."""

    items: tuple[T, ...]
    steps: tuple[float, ...]

    @classmethod
    def of(cls, items: Sequence[T], offset: float = 4.0) -> Tail[T]:
        """Give the item of rank r a probability proportional to 1 / (r + offset)."""
        return cls(tuple(items), tuple(accumulate(1 / (r + offset) for r in range(len(items)))))

    def draw(self, rng: Random) -> T:
        """Draw one item by its probability."""
        return rng.choices(self.items, cum_weights=self.steps)[0]


def sentence(text: str) -> str:
    """Capitalize the text and end it with a period."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
