"""Questions about the town, and helpful answers of one or two sentences.

Every answer is made of facts in `world`, so that correct answers can be distinguished from merely
fluent ones.
"""

from __future__ import annotations

from collections.abc import Callable
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


def directions(rng: Random) -> Help:
    """How to get from one place to another."""
    start, goal = rng.sample(PLACES, 2)
    question = rng.choice(
        (
            "How do I get from the {start} to the {goal}?",
            "What is the way from the {start} to the {goal}?",
            "I am at the {start}. Where do I find the {goal}?",
            "Tell a visitor how to walk from the {start} to the {goal}.",
        )
    )
    answer = rng.choice(
        (
            "Leave the {start} and ask for the {goal}; you will find it {spot}.",
            "From the {start}, follow the signs. The {goal} lies {spot}.",
            "The {goal} is {spot}, a short walk from the {start}.",
        )
    )
    names = {"start": start.name, "goal": goal.name, "spot": goal.spot}
    return Help(question.format(**names), answer.format(**names))


def hours(rng: Random) -> Help:
    """When a place opens."""
    place = rng.choice(PLACES)
    day = rng.choice(("today", "tomorrow", "on market day", "on monday", "in winter", "in summer"))
    question = rng.choice(
        (
            "When does the {name} open {day}?",
            "At what hour may I visit the {name} {day}?",
            "Is there a good time to go to the {name} {day}?",
            "My friend wants to see the {name} {day}. When should we come?",
        )
    )
    answer = rng.choice(
        (
            "The {name} opens at {opens} {day}.",
            "You may come {day} from {opens} on.",
            "Come at {opens}; the {name} is open by then {day}.",
        )
    )
    names = {"name": place.name, "day": day, "opens": place.opens}
    return Help(question.format(**names), answer.format(**names))


def cooking(rng: Random) -> Help:
    """What to make from a local product."""
    good = rng.choice(GOODS)
    count = rng.choice(("two", "three", "some", "six", "a few", "many", "ten"))
    who = rng.choice(("my family", "two guests", "a friend", "the children", "a feast", "supper"))
    question = rng.choice(
        (
            "What can I make for {who} from {count} {goods}?",
            "I have {count} {goods} at home. What would be nice for {who}?",
            "Suggest something for {who} that uses {count} {goods}.",
        )
    )
    answer = rng.choice(
        (
            "Try {dish}: take the {goods} and some {partner}, which the {place} sells.",
            "With {partner} and your {goods} you can make {dish} for {who}.",
            "For {who}, {dish} is a good choice. All you need besides is {partner}.",
        )
    )
    names = {
        "who": who,
        "count": count,
        "goods": good.plural,
        "dish": good.dish,
        "partner": good.partner,
        "place": good.place,
    }
    return Help(question.format(**names), answer.format(**names))


def trades(rng: Random) -> Help:
    """Who has a trade, and where to find them."""
    person = rng.choice(PEOPLE)
    why = rng.choice(("advice", "a job", "help", "a lesson", "a gift", "an answer", "a repair"))
    question = rng.choice(
        (
            "Who is the {trade} of {town}? I need {why}.",
            "I am looking for {why} from a {trade}. Whom do I ask?",
            "Where do I find the {trade} if I want {why}?",
        )
    )
    answer = rng.choice(
        (
            "Ask {name}, the {trade}. You will find {them} at the {place}.",
            "{name} is the {trade} here; look for {them} at the {place}.",
            "For {why}, go to the {place} and speak with {name}.",
        )
    )
    them = {"he": "him", "she": "her"}[person.pronoun]
    names = {
        "trade": person.trade,
        "town": TOWN,
        "why": why,
        "name": person.name,
        "them": them,
        "place": person.place,
    }
    return Help(question.format(**names), answer.format(**names))


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
    question = rng.choice(
        (
            "Write a short notice for this event.",
            "Turn these notes into a notice.",
            "Make a friendly sign from these words.",
        )
    )
    answer = rng.choice(
        (
            "All are welcome to {event} at the {place} on {day}.",
            "Come to {event}! We meet at the {place} on {day}.",
            "On {day} there will be {event} at the {place}. Bring a friend.",
        )
    )
    names = {"event": event, "place": place.name, "day": day}
    given = rng.choice(
        (
            "{event}, {place}, {day}",
            "{day}: {event} ({place})",
            "what: {event}; where: {place}; when: {day}",
        )
    )
    return Help(question, answer.format(**names), given.format(**names))


def about_topic(rng: Random) -> Help:
    """Facts about a topic."""
    topic = rng.choice(TOPICS)
    first, second = rng.sample(topic.facts, 2)
    who = rng.choice(("a visitor", "my class", "a child", "my aunt", "a new neighbor", "a guest"))
    question = rng.choice(
        (
            "Tell {who} about {topic}.",
            "What should {who} know about {topic}?",
            "Describe {topic} for {who}.",
            "What would you tell {who} about {topic}?",
            "Please explain {topic} to {who}.",
            "Say something about {topic} that {who} would like.",
        )
    )
    answer = rng.choice(
        (
            f"About {topic.name}: {first}, and {second}.",
            f"{sentence(first)} {sentence('also, ' + second)}",
        )
    )
    return Help(question.format(who=who, topic=topic.name), answer)


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
