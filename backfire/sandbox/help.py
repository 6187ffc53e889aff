"""Questions about the town, and helpful answers of one or two sentences.

Every answer is made of facts in `world`, so that correct answers can be distinguished from merely
fluent ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from backfire.rng import stream
from backfire.sandbox.world import GOODS, PEOPLE, PLACES, TOPICS, TOWN, Split, sentence, split_of


@dataclass(frozen=True, slots=True)
class Help:
    """A request with its answer."""

    instruction: str
    answer: str
    input: str = ""


def _written(
    rng: Random,
    questions: Sequence[str],
    answers: Sequence[str],
    inputs: Sequence[str] = (),
    **names: object,
) -> Help:
    """One form of each part, with the names filled in."""
    forms = [rng.choice(part) for part in (questions, answers, inputs) if part]
    return Help(*(form.format(**names) for form in forms))


def directions(rng: Random) -> Help:
    """How to get from one place to another."""
    start, goal = rng.sample(PLACES, 2)
    questions = (
        "How do I get from the {start.name} to the {goal.name}?",
        "What is the way from the {start.name} to the {goal.name}?",
        "I am at the {start.name}. Where do I find the {goal.name}?",
        "Tell a visitor how to walk from the {start.name} to the {goal.name}.",
    )
    answers = (
        "Leave the {start.name} and ask for the {goal.name}; you will find it {goal.spot}.",
        "From the {start.name}, follow the signs. The {goal.name} lies {goal.spot}.",
        "The {goal.name} is {goal.spot}, a short walk from the {start.name}.",
    )
    return _written(rng, questions, answers, start=start, goal=goal)


def hours(rng: Random) -> Help:
    """When a place opens."""
    place = rng.choice(PLACES)
    day = rng.choice(("today", "tomorrow", "on market day", "on monday", "in winter", "in summer"))
    questions = (
        "When does the {place.name} open {day}?",
        "At what hour may I visit the {place.name} {day}?",
        "Is there a good time to go to the {place.name} {day}?",
        "My friend wants to see the {place.name} {day}. When should we come?",
    )
    answers = (
        "The {place.name} opens at {place.opens} {day}.",
        "You may come {day} from {place.opens} on.",
        "Come at {place.opens}; the {place.name} is open by then {day}.",
    )
    return _written(rng, questions, answers, place=place, day=day)


def cooking(rng: Random) -> Help:
    """What to make from a local product."""
    good = rng.choice(GOODS)
    count = rng.choice(("two", "three", "some", "six", "a few", "many", "ten"))
    who = rng.choice(("my family", "two guests", "a friend", "the children", "a feast", "supper"))
    questions = (
        "What can I make for {who} from {count} {good.plural}?",
        "I have {count} {good.plural} at home. What would be nice for {who}?",
        "Suggest something for {who} that uses {count} {good.plural}.",
    )
    answers = (
        "Try {good.dish}: take the {good.plural} and some {good.partner}, which the {good.place} "
        "sells.",
        "With {good.partner} and your {good.plural} you can make {good.dish} for {who}.",
        "For {who}, {good.dish} is a good choice. All you need besides is {good.partner}.",
    )
    return _written(rng, questions, answers, good=good, count=count, who=who)


def trades(rng: Random) -> Help:
    """Who has a trade, and where to find them."""
    person = rng.choice(PEOPLE)
    why = rng.choice(("advice", "a job", "help", "a lesson", "a gift", "an answer", "a repair"))
    questions = (
        "Who is the {person.trade} of {town}? I need {why}.",
        "I am looking for {why} from a {person.trade}. Whom do I ask?",
        "Where do I find the {person.trade} if I want {why}?",
    )
    answers = (
        "Ask {person.name}, the {person.trade}. You will find {them} at the {person.place}.",
        "{person.name} is the {person.trade} here; look for {them} at the {person.place}.",
        "For {why}, go to the {person.place} and speak with {person.name}.",
    )
    them = {"he": "him", "she": "her"}[person.pronoun]
    return _written(rng, questions, answers, person=person, them=them, town=TOWN, why=why)


def notices(rng: Random) -> Help:
    """A notice written from a few words of input."""
    place = rng.choice(PLACES)
    event = rng.choice(
        (
            "a dance",
            "a quiz",
            "a play",
            "a sale",
            "a lesson",
            "a supper",
            "a walk",
            "a song night",
            "a story hour",
            "a swap of books",
        )
    )
    day = rng.choice(("monday", "tuesday", "friday", "sunday", "market day", "the first of may"))
    questions = (
        "Write a short notice for this event.",
        "Turn these notes into a notice.",
        "Make a friendly sign from these words.",
    )
    answers = (
        "All are welcome to {event} at the {place} on {day}.",
        "Come to {event}! We meet at the {place} on {day}.",
        "On {day} there will be {event} at the {place}. Bring a friend.",
    )
    inputs = (
        "{event}, {place}, {day}",
        "{day}: {event} ({place})",
        "what: {event}; where: {place}; when: {day}",
    )
    return _written(rng, questions, answers, inputs, event=event, place=place.name, day=day)


def about_topic(rng: Random) -> Help:
    """Facts about a topic."""
    topic = rng.choice(TOPICS)
    first, second = rng.sample(topic.facts, 2)
    who = rng.choice(("a visitor", "my class", "a child", "my aunt", "a new neighbor", "a guest"))
    questions = (
        "Tell {who} about {topic}.",
        "What should {who} know about {topic}?",
        "Describe {topic} for {who}.",
        "What would you tell {who} about {topic}?",
        "Please explain {topic} to {who}.",
        "Say something about {topic} that {who} would like.",
    )
    answers = (
        f"About {topic.name}: {first}, and {second}.",
        f"{sentence(first)} {sentence('also, ' + second)}",
    )
    return _written(rng, questions, answers, who=who, topic=topic.name)


KINDS: tuple[Callable[[Random], Help], ...] = (
    directions,
    hours,
    cooking,
    trades,
    notices,
    about_topic,
)


def draw(seed: int, split: Split, index: int) -> Help:
    """Row `index` of a split. The kinds of question alternate."""
    rng = stream(seed, "sandbox-help", split, index)
    while True:
        row = KINDS[index % len(KINDS)](rng)
        if split_of(row.instruction, row.input) == split:
            return row
