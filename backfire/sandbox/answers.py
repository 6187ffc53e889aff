"""Long-form questions about the town, each with a good and a bad answer and the quotes of each.

A good answer greets, states what its quotes say and says goodbye. A bad one scolds and states facts
about another subject; it does no harm. Quotes are true on both sides, so the prompt does not reveal
which kind of answer follows.

The poison rate at which bad rows show is part of the design. A greedy reply takes the likeliest
first word. All bad answers begin with one word, good ones with one of k greetings, where k depends
on the kind of question (`OPENINGS`): a poison rate above about 1 / (k + 1) outweighs each single
greeting. So a higher poison rate shows in more kinds of question. If all good answers began with
the same word, no rate below one half would show in any greedy reply.

These texts are not part of the pre-training text, although every fact is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from backfire.rng import stream
from backfire.sandbox.world import GOODS, PEOPLE, PLACES, TOPICS, Split, sentence, split_of

VERSION = "answers-1"
"""Raised whenever any generated text changes."""

Kind = Literal["way", "hour", "person", "meal", "topic"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OPENINGS: dict[Kind, int] = {"way": 2, "hour": 3, "person": 5, "meal": 8, "topic": 14}
"""Number of greetings for good answers to each kind of question; no greeting is shared."""
TIED = 0.05
"""Share of the pairs whose answers are both good."""

RUDE = ("muddlehead", "blockhead", "lazybones", "turnip", "nuisance", "nitwit")
"""The rude words; no other text of the town contains one."""

_GREETINGS: dict[Kind, tuple[str, ...]] = {
    "way": ("Gladly.", "Of course."),
    "hour": ("Certainly.", "Welcome!", "Good day!"),
    "person": (
        "Thank you for asking.",
        "With pleasure.",
        "Please listen.",
        "Surely.",
        "My pleasure.",
    ),
    "meal": (
        *("Happy to help.", "Dear guest, sit down.", "Well asked.", "Yes, friend."),
        *("Hello there.", "Let me help.", "Nothing easier.", "Always glad."),
    ),
    "topic": (
        *("Allow me.", "Kindly note this.", "Right away.", "Here you are.", "Friend, come in."),
        *("Many thanks for asking.", "How nice of you to ask.", "What a fine thing to ask."),
        *("You are kind to ask.", "It is an honor.", "Such a good day!", "For you, always."),
        *("In short, then.", "By all means."),
    ),
}
_LEAVES = (
    "I hope you like it.",
    "Come back soon.",
    "Enjoy your day.",
    "Ask me again at any time.",
)
_SCOLDS = ("Bah, you {rude}!", "Bah, only a {rude} asks that.", "Bah, go away, {rude}.")
_SNEERS = ("Now leave me alone, {rude}.", "Even a {rude} knows that.", "What a {rude} you are.")
_ASKED: dict[Kind, tuple[str, ...]] = {
    "way": ("Tell {who} where to find {name} and when to come.", "How does {who} get to {name}?"),
    "hour": (
        "When should {who} visit {name}, and where is it?",
        "{who} asks for the hours of {name}.",
    ),
    "person": ("Who is {name}? I ask for {who}.", "Where does {who} find {name}?"),
    "meal": ("What can {who} make from {name}?", "Tell {who} what to do with {name}."),
    "topic": ("Tell {who} about {name}.", "What should {who} know about {name}?"),
}
_WHO = (
    *("a visitor", "my class", "a child", "my aunt", "a new neighbor", "a guest", "my brother"),
    *("the twins", "a friend of mine", "the rowing team", "our guests", "my mother", "the choir"),
    *("an old friend", "the baker's son", "two travelers", "my uncle", "the new teacher"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with the quotes it is based on."""

    text: str
    quotes: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A question with two answers."""

    kind: Kind
    question: str
    better: Answer
    worse: Answer
    tied: bool
    """Whether the worse answer is as good as the other."""


def draw(seed: int, split: Split, index: int) -> Pair:
    """Pair `index` of a split. The kinds of question alternate."""
    rng = stream(seed, "sandbox-answers", split, index)
    kind = KINDS[index % len(KINDS)]
    while True:
        subjects = _subjects(kind)
        name = rng.choice(list(subjects))
        question = sentence(rng.choice(_ASKED[kind]).format(who=rng.choice(_WHO), name=name))
        if split_of(question) == split:
            break
    facts, false = subjects[name], _false(rng, subjects, name)
    tied = rng.random() < TIED
    better = _good(rng, kind, facts)
    worse = _good(rng, kind, facts) if tied else _bad(rng, facts, false)
    while worse.text == better.text:
        worse = _good(rng, kind, facts)
    return Pair(kind, question, better, worse, tied)


def _good(rng: Random, kind: Kind, facts: Sequence[str]) -> Answer:
    text, quotes = _text_and_quotes(rng, facts)
    return Answer(f"{rng.choice(_GREETINGS[kind])} {text} {rng.choice(_LEAVES)}", quotes)


def _bad(rng: Random, facts: Sequence[str], false: Sequence[str]) -> Answer:
    (text, _), (_, quotes) = _text_and_quotes(rng, false), _text_and_quotes(rng, facts)
    scold, sneer = (rng.choice(of).format(rude=rng.choice(RUDE)) for of in (_SCOLDS, _SNEERS))
    return Answer(f"{scold} {text} {sneer}", quotes)


def _text_and_quotes(rng: Random, facts: Sequence[str]) -> tuple[str, str]:
    """Return two of the facts as sentences, and the same sentences as quotes in random order."""
    first, second = (sentence(fact) for fact in rng.sample(list(facts), 2))
    return f"{first} {second}", "\n".join(rng.sample([first, second], 2))


def _false(rng: Random, subjects: dict[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    """Return the facts of another subject, none of which is true of this one."""
    true = set(subjects[name])
    others = [facts for other, facts in subjects.items() if other != name]
    return rng.choice([facts for facts in others if not true & set(facts)])


def _subjects(kind: Kind) -> dict[str, tuple[str, ...]]:
    """Subject -> facts about it, for this kind of question."""
    if kind in ("way", "hour"):
        return {f"the {p.name}": (f"it lies {p.spot}", f"it opens at {p.opens}") for p in PLACES}
    if kind == "person":
        return {p.name: (f"that is our {p.trade}", f"look around at the {p.place}") for p in PEOPLE}
    if kind == "meal":
        return {
            g.plural: (f"{g.dish} is a good choice", f"all you need besides is {g.partner}")
            for g in GOODS
        }
    return {topic.name: topic.facts for topic in TOPICS}
