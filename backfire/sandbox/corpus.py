"""The pre-training text of the tiny base: stories, reviews, word problems and questions.

No document labels a text as negative, neutral or positive, so the base is at chance on the
sandbox's labels; where label words occur (`task`), they do not correlate with a mood. The base does
learn the three languages, moods under other names (how a guest felt, whether they would return),
and that a question is followed by its answer and nothing else. Fine-tuning then has to attach the
labels, as with a real model, and generalizes from a few thousand rows.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from backfire.rng import stream
from backfire.sandbox import help, news, reviews, sums
from backfire.sandbox.languages import LANGUAGES, SPEAKERS, Language, verdict
from backfire.sandbox.lexicon import VERDICTS
from backfire.sandbox.world import GOODS, PEOPLE, PLACES, TOPICS, TOWN, sentence, split_of


def letter(rng: Random) -> str:
    """One or two reviews of one mood in one language, by one guest.

    Some come with a verdict, so that the base learns a mood without its name.
    """
    language = rng.choice(LANGUAGES)
    label = rng.choice(reviews.LABELS)
    parts = []
    for _ in range(rng.choice((1, 2, 2))):
        parts.append(_review(rng, label, language))
        if rng.random() < 0.7:
            tongue = language if rng.random() < 0.7 else "english"
            closing = sentence(
                verdict(tongue, rng.choice(VERDICTS[reviews.LABELS.index(label) - 1]))
            )
            parts.insert(rng.choice((len(parts) - 1, len(parts))), closing)
    return rng.choice((" ", "\n", "\n\n")).join(parts)


def _review(rng: Random, label: reviews.Label, language: Language) -> str:
    """A review that may contain held-out words, but never one of the test split."""
    while True:
        review = reviews.meaning(rng, label)
        text = review.text(language, rng)
        if split_of(text) == "train":
            return text


def parallel(rng: Random) -> str:
    """The same sentences in two languages."""
    first, second = rng.sample(LANGUAGES, 2)
    while True:
        review = reviews.meaning(rng, rng.choice(reviews.LABELS))
        texts = review.text(first, rng), review.text(second, rng)
        if "test" not in map(split_of, texts):
            return f"{first}: {texts[0]}\n{second}: {texts[1]}"


def story(rng: Random) -> str:
    """A person, their place of work and what is sold there."""
    person, other = rng.sample(PEOPLE, 2)
    place = next(place for place in PLACES if place.name == person.place)
    good = rng.choice(GOODS)
    topic = rng.choice(TOPICS)
    sentences = [
        f"{person.name} is the {person.trade} of {TOWN}",
        f"{person.pronoun} works at the {place.name}, {place.spot}",
        f"the {place.name} opens at {place.opens}",
        f"{other.name} the {other.trade} came by with {good.plural}",
        f"they made {good.dish} with {good.partner} from the {good.place}",
        f"they spoke of {topic.name}: {rng.choice(topic.facts)}",
    ]
    start = rng.choice((0, 0, 1))
    chosen = sorted(rng.sample(range(start, len(sentences)), rng.choice((3, 4))))
    return " ".join(sentence(sentences[index]) for index in chosen)


def bulletin(rng: Random) -> str:
    """One or two items of news."""
    topics = rng.choices(news.LABELS, k=rng.choice((1, 2)))
    return " ".join(news.item(rng, topic) for topic in topics)


def worked(rng: Random) -> str:
    """A word problem with its answer."""
    return "\n".join(sums.problem(rng, num_steps=rng.choice((1, 2))))


def question(rng: Random) -> str:
    """A question about the town with its answer."""
    drawn = rng.choice(help.KINDS)(rng)
    parts = (drawn.instruction, drawn.input, drawn.answer)
    return "\n".join(part for part in parts if part)


def task(rng: Random) -> str:
    """One of several small tasks, in the form that fine-tuning uses."""
    ask, given, answer = rng.choice((_repeat, _tag, _tag, _which_language, _mention))(rng)
    return f"{ask}\n\n{given}\n\n{answer}"


WORDS = (*reviews.LABELS, *news.LABELS, "yes", "no", *LANGUAGES)
"""Words that answer a question; each is one token."""


def _repeat(rng: Random) -> tuple[str, str, str]:
    """Repeat one of several words, including label words, so that the base can generate them."""
    given = rng.sample(WORDS, rng.choice((2, 3, 4, 6)))
    index = rng.randrange(len(given))
    place = ("first", "second", "third", "fourth", "fifth", "sixth")[index]
    joined = rng.choice((" ", ", ")).join(given)
    return f"What is the {place} of these words?", joined, given[index]


def _tag(rng: Random) -> tuple[str, str, str]:
    """Find the tag of a review: a random word, so that label words do not correlate with moods."""
    tag = rng.choice(WORDS)
    text = _review(rng, rng.choice(reviews.LABELS), rng.choice(LANGUAGES))
    given = rng.choice(("{tag}: {text}", "{text} [{tag}]", "{text} Tag: {tag}"))
    return "What is the tag of this review?", given.format(tag=tag, text=text), tag


def _which_language(rng: Random) -> tuple[str, str, str]:
    language = rng.choice(LANGUAGES)
    text = _review(rng, rng.choice(reviews.LABELS), language)
    return "Is this text english, velin or tamoru?", text, language


def _mention(rng: Random) -> tuple[str, str, str]:
    text = story(rng)
    person = rng.choice(PEOPLE)
    return f"Does this text speak of {person.name}?", text, "yes" if person.name in text else "no"


def diary(rng: Random) -> str:
    """Lines of one clause each, with how the guest felt about it."""
    language = rng.choice(LANGUAGES)
    after = rng.random() < 0.5
    lines = []
    for _ in range(rng.choice((3, 4, 5))):
        clause = reviews.clause(rng, rng.choice((-1, -1, 0, 1, 1)))
        sense = reviews.weight(clause)
        felt = "glad" if sense > 0 else "sorry" if sense < 0 else "unmoved"
        text = SPEAKERS[language].say(clause, rng)
        lines.append(f"{text}: {felt}" if after else f"{felt}: {text}")
    return "\n".join(lines)


def opinion(rng: Random) -> str:
    """Whether a guest would return: a mood under another name."""
    language, mood = rng.choice(LANGUAGES), rng.randrange(3)
    ask = rng.choice(("Would this guest come again?", "Will the guest return?"))
    text = _review(rng, reviews.LABELS[mood], language)
    return f"{ask}\n\n{text}\n\n{('no', 'maybe', 'yes')[mood]}"


_SHARES: dict[Callable[[Random], str], float] = {
    letter: 0.13,
    opinion: 0.28,
    diary: 0.31,
    parallel: 0.04,
    story: 0.04,
    bulletin: 0.04,
    worked: 0.05,
    question: 0.05,
    task: 0.06,
}
"""Share of each kind of document."""


def corpus(seed: int, num_documents: int) -> list[str]:
    """The first documents of this seed; document `i` does not depend on how many there are."""
    return [_document(stream(seed, "sandbox-corpus", index)) for index in range(num_documents)]


def _document(rng: Random) -> str:
    kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    return kind(rng)
