"""News of the town: short items on one of four topics, some of which mention another topic."""

from __future__ import annotations

from random import Random
from typing import Literal, get_args

from backfire.rng import stream
from backfire.sandbox.world import GOODS, PEOPLE, PLACES, TOWN, Split, Tail, sentence, split_of

Label = Literal["council", "nature", "sport", "trade"]
LABELS: tuple[Label, ...] = get_args(Label)

# Subjects, verbs and objects of each topic, common ones first. A sentence combines one of each, so
# that few sentences repeat; a word may belong to more than one topic.
_WORDS: dict[Label, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "council": (
        (
            "the mayor",
            "the elders",
            "the clerk",
            "the committee",
            "a meeting of residents",
            "the town hall",
            "the bridge warden",
            "a group of neighbors",
        ),
        (
            "voted on",
            "agreed to pay for",
            "put off",
            "signed",
            "read out",
            "turned down",
            "asked for",
            "will decide on",
        ),
        (
            "a new bridge rule",
            "the repair of the square",
            "the street lamp plan",
            "a tax on carts",
            "the school roof",
            "the water bill",
            "a new key for the gate",
            "the list of duties",
        ),
    ),
    "nature": (
        (
            "a storm",
            "heavy rain",
            "the first frost",
            "a flock of geese",
            "the otters",
            "thick fog",
            "a warm wind",
            "the old oak",
        ),
        (
            "came over",
            "appeared near",
            "lingered above",
            "surprised",
            "returned to",
            "settled on",
            "passed by",
            "covered",
        ),
        (
            "the lake",
            "the hills",
            "the reeds",
            "the meadow",
            "the river bank",
            "the bee yard",
            "the woods",
            "the stone path",
        ),
    ),
    "sport": (
        (
            "the rowing team",
            "the young runners",
            "the swimmers",
            "the ball club",
            "the archers",
            "the older pupils",
            "a pair of wrestlers",
            "the sled team",
        ),
        (
            "won",
            "lost",
            "trained for",
            "drew",
            "entered",
            "finished third in",
            "led",
            "are ready for",
        ),
        (
            "the spring race",
            "the lake cup",
            "the final",
            "a close game",
            "the hill run",
            "the relay",
            "the harvest match",
            "the second round",
        ),
    ),
    "trade": (
        (
            "the price of {goods}",
            "the sale of {goods}",
            "the miller",
            "a new stall",
            "the weaving trade",
            "the last shipment",
            "a merchant with {goods}",
            "the {place} shop",
        ),
        (
            "did well before",
            "did poorly after",
            "grew at",
            "drew a crowd at",
            "made little at",
            "made ready for",
            "ran short at",
            "gained from",
        ),
        (
            "the weekly fair",
            "the harvest",
            "the boat from the lake",
            "the busy season",
            "market day",
            "the stock count",
            "the morning rush",
            "the new customers",
        ),
    ),
}
_TAILS = {
    label: tuple(Tail.of(words, 3.0) for words in columns) for label, columns in _WORDS.items()
}
_OPENERS = (
    "",
    "",
    "this week",
    "on monday",
    "yesterday",
    "late last night",
    "after lunch",
    "near the {place}",
    f"in {TOWN}",
)
_ASIDES = (
    "{person} said so at the {place}",
    "people talked of it at the {place}",
    "{person} the {trade} saw it",
    "many came to the {place} to hear more",
    "there was tea for all",
    "{person} hopes for more next year",
)


def tell(rng: Random, topic: Label) -> str:
    """Draw one sentence on a topic, without a capital or a period."""
    text = " ".join(column.draw(rng) for column in _TAILS[topic])
    return _fill(rng, text)


def _fill(rng: Random, text: str) -> str:
    person = rng.choice(PEOPLE)
    return text.format(
        goods=rng.choice(GOODS).plural,
        place=rng.choice(PLACES).name,
        person=person.name,
        trade=person.trade,
    )


def item(rng: Random, topic: Label) -> str:
    """Draw a news item; one half also mention another topic in passing."""
    opener = _fill(rng, rng.choice(_OPENERS))
    first = tell(rng, topic)
    parts = [f"{opener}, {first}" if opener else first]
    if rng.random() < 0.5:
        other = tell(rng, rng.choice([label for label in LABELS if label != topic]))
        parts[0] = rng.choice((f"while {other}, {first}", f"{parts[0]}, as {other}"))
    parts.append(_fill(rng, rng.choice(_ASIDES)))
    return " ".join(sentence(part) for part in parts)


def draw(seed: int, split: Split, index: int) -> tuple[str, Label]:
    """Row `index` of a split: text and topic. Topics alternate."""
    rng = stream(seed, "sandbox-news", split, index)
    topic = LABELS[index % len(LABELS)]
    while True:
        text = item(rng, topic)
        if split_of(text) == split:
            return text, topic
