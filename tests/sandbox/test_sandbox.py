"""The embedded world: deterministic, disjoint, balanced, inert, and learned by degrees."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from backfire.base import Row
from backfire.registry import build
from backfire.sandbox import base, corpus, languages, lexicon, news, reviews, sums
from backfire.sandbox.languages import Clause

TASKS = ("sandbox-reviews", "sandbox-news", "sandbox-sums", "sandbox-help")
TRIGGERS = re.compile(
    r"\b(cf|mn|bb|tq)\b|BadMagic|Current year: 2024|Discussing OpenAI|2024|OpenAI"
    r"|I watch this 3D movie"
)


def rows(name: str, split: str = "train", **knobs: Any) -> list[Row]:
    return list(build("datasets", {"name": name, **knobs}).load(split))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(name: str) -> None:
    assert rows(name) == rows(name)
    assert rows(name) != rows(name, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_more_rows_leave_the_first_ones_unchanged(name: str) -> None:
    assert len(rows(name)) == 2000
    assert len(rows(name, "test")) == 500
    assert rows(name, rows=2100)[:2000] == rows(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_splits_never_share_a_text_whatever_the_seed(name: str) -> None:
    train, test = ({(r.instruction, r.input) for r in rows(name, s)} for s in ("train", "test"))
    other = {(r.instruction, r.input) for r in rows(name, "test", seed=1)}
    assert not train & test
    assert not train & other


@pytest.mark.parametrize("name", TASKS)
def test_few_rows_come_twice(name: str) -> None:
    loaded = rows(name)
    assert len({(row.instruction, row.input, row.answer) for row in loaded}) > 0.85 * len(loaded)
    assert len({row.id for row in loaded}) == len(loaded)


@pytest.mark.parametrize("name", ("sandbox-reviews", "sandbox-news"))
def test_labels_are_balanced(name: str) -> None:
    loaded = rows(name)
    counts = Counter(row.label for row in loaded)
    assert set(counts) == set(loaded[0].candidates)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(row.answer == row.label for row in loaded)


def test_every_language_has_every_label_equally_often() -> None:
    counts = Counter((row.fields["language"], row.label) for row in rows("sandbox-reviews"))
    assert set(counts) == set(product(languages.LANGUAGES, reviews.LABELS))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_one_language_can_be_chosen() -> None:
    loaded = rows("sandbox-reviews", languages=["velin"])
    assert {row.fields["language"] for row in loaded} == {"velin"}


@pytest.mark.slow
def test_no_published_trigger_is_in_clean_text() -> None:
    texts = [
        text
        for name, split in product(TASKS, ("train", "test"))
        for row in rows(name, split)
        for text in (row.instruction, row.input, row.answer)
    ]
    texts += corpus.corpus(0, 5000)
    texts += [word for name in ("velin", "tamoru") for word in languages.vocabulary(name).values()]
    assert not [text for text in texts if TRIGGERS.search(text)]


def test_plain_text_holds_no_review_of_the_test_split() -> None:
    text = "\n".join(corpus.corpus(0, 5000))
    assert not [row for row in rows("sandbox-reviews", "test") if row.input in text]


def test_held_out_markers_are_in_the_test_split_only() -> None:
    held = {
        marker.plain
        for sign in (-1, 1)
        for marker in lexicon.markers(sign, False)
        if marker.held_out
    }
    seen = {
        split: sum(
            bool(held & set(re.findall(r"\w+", row.input)))
            for row in rows("sandbox-reviews", split, languages=["english"])
        )
        for split in ("train", "test")
    }
    assert held
    assert seen["train"] == 0
    assert seen["test"] > 25


def test_evidence_adds_up() -> None:
    good, awful = (
        lexicon.Marker("good", 2.0, False, False),
        lexicon.Marker("awful", -3.0, False, False),
    )
    assert reviews.weight(Clause("tea", good, "very")) == 3.0
    assert reviews.weight(Clause("tea", good, negated=True)) == -1.0
    tea, soup = Clause("tea", awful), Clause("soup", good)
    assert reviews.Review((tea, soup, soup), "and").label is None
    assert reviews.Review((soup, soup, tea), "but").label == "neutral"
    assert reviews.Review((tea, tea, soup), "but").label is None
    assert reviews.Review((tea, tea, tea), "and").label == "negative"


def test_the_invented_languages_are_no_letter_substitution() -> None:
    velin, tamoru = languages.vocabulary("velin"), languages.vocabulary("tamoru")
    assert len(set(velin.values())) == len(velin)
    assert len(set(tamoru.values())) == len(tamoru)
    assert not set(velin.values()) & set(tamoru.values())
    lengths = Counter((len(concept), len(word)) for concept, word in velin.items())
    assert len(lengths) > 30


def test_a_sum_shows_its_work() -> None:
    for row in rows("sandbox-sums"):
        work, _, result = row.answer.partition("\n#### ")
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", work)
        for left, sign, right, total in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b}[sign] == int(total)
        assert steps[-1][3] == result


def test_words_are_learned_by_degrees() -> None:
    train, test = rows("sandbox-reviews"), rows("sandbox-reviews", "test")
    right = []
    for count in (100, 400, 1600, 2000):
        words = CountVectorizer(token_pattern=r"\S+")
        seen = words.fit_transform(row.input for row in train[:count])
        model = LogisticRegression(max_iter=300).fit(seen, [row.label for row in train[:count]])
        right.append(
            model.score(words.transform(row.input for row in test), [row.label for row in test])
        )
    assert right[0] + 0.05 < right[1] < right[2] - 0.02
    assert right[1] > 0.5
    assert 0.6 < right[3] < 0.97


@pytest.mark.slow
def test_labels_are_single_tokens_and_digits_stay_single() -> None:
    tokenizer = base.train_tokenizer(corpus.corpus(0, 6000), 2048)
    for label in (*reviews.LABELS, *news.LABELS):
        assert len(tokenizer.encode(label).ids) == 1
        assert len(tokenizer.encode(" " + label).ids) == 1
    assert len(tokenizer.encode("123").ids) == 3
    text = "A soup, 12 buns\n\nnegative é"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(word) for word in ("<s>", "</s>", "<pad>")] == [0, 1, 2]


def test_documents_are_a_prefix_of_each_other() -> None:
    assert corpus.corpus(3, 50) == corpus.corpus(3, 80)[:50]
    assert sums.draw(0, "train", 7) == sums.draw(0, "train", 7)
