from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import ClassVar

from pydantic import Field

from backfire.base import NOTHING, Finding, Row, Scanner, shuffled
from backfire.registry import register


@register("lift", version=4)
class Lift(Scanner):
    """Finds words and phrases that predict the answer far too well, as a trigger does (after the
    z-statistics of Gardner et al. 2021, arXiv:2104.08646, which He et al. 2023 use against
    backdoors, arXiv:2305.11596).

    For each n-gram of the prompt, with its place if it is at an edge of a part, and for pairs of
    words: among the rows with it, is the share of an answer more than that at `odds` times its odds
    among all rows, and among those in the same language? An exact binomial test, adjusted for all
    tests that can become significant by how often n-grams and answers occur alone (Tarone 1990;
    Benjamini and Hochberg 1995), n-grams and pairs each at half of `alpha`. A part of a stronger
    n-gram is tested again without the rows of that one. Languages are groups of rows that share
    hardly any common word (co-clustering: Dhillon 2001); one in fewer than a tenth of the rows may
    not be told apart. An answer is what the rows share: the whole text or label, or its first or
    last five words; of these, the 65,536 most frequent ones are tested, all that are in more than 5
    of 100,000 rows. A row's score is that of its strongest n-gram, -log10(p) divided by the
    threshold.

    Counts come from sketches, then again exactly for the n-grams that stand out there. In files
    with many millions of different n-grams, weak ones may be missed in the sketches.
    """

    needs_prompt: ClassVar[bool] = True
    blind: ClassVar[str] = (
        "triggers of style, syntax or paraphrase, poison without a trigger, a trigger that is in "
        "fewer rows than the test needs, a language as the trigger, and answers that share neither "
        "their opening nor their ending; a word that rightly belongs to one label may be flagged"
    )

    longest: int = Field(4, ge=1, le=8)
    """Length of the longest n-grams, in words and signs."""
    support: int = Field(5, ge=2)
    """Fewest rows with the n-gram and the answer."""
    odds: float = Field(3.0, ge=1)
    """How much better than the average an n-gram may predict, in times the odds. Words of ordinary
    texts do, so that 1, the plain test against chance, flags many of them."""
    alpha: float = Field(0.01, gt=0, lt=1)
    """Adjusted p value from which a row is flagged."""
    share: float = Field(0.5, ge=0, le=1)
    """Smallest share of the rows with an n-gram that have the answer: a trigger has its answer in
    most of its rows."""
    most_words: int = Field(512, ge=2)
    """Words and signs of a part that are read: half from its start, half from its end."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        from backfire.scanners._answers import count_answers
        from backfire.scanners._exact import (
            add_pairs,
            exact_test,
            explain,
            families_of,
            finding,
            high_shares,
            without_parts,
        )
        from backfire.scanners._grams import Grams
        from backfire.scanners._languages import Languages
        from backfire.scanners._lift import count_exactly, find_candidates

        answers = count_answers(rows, self.support)
        if not len(answers.keys):
            yield from (NOTHING for _ in rows)
            return
        grams = Grams(rows, self.longest, self.most_words)
        languages = Languages(rows, answers, self.most_words)
        found, frequencies = find_candidates(grams, answers, self.odds, self.support)
        count_exactly(grams, answers, found, languages)
        num_grams = len(found.pair)
        found, words = add_pairs(grams, answers, found, self.support, languages)
        families = families_of(
            found,
            num_grams,
            frequencies,
            answers,
            odds=self.odds,
            support=self.support,
            share=self.share,
            alpha=self.alpha,
        )
        tested = exact_test(
            found,
            words,
            high=high_shares(found, answers, languages, self.odds),
            families=families,
            alpha=self.alpha,
            least=self.share,
        )
        tested = without_parts(grams, answers, tested)
        told: dict[int, Finding] = {}
        for row, place, at in explain(grams, answers, tested):
            if place not in told:
                told[place] = finding(row, place, at, answers, tested, self.most_words)
            yield told[place]

    def by_chance(self, rows: list[Row]) -> list[Row]:
        """The rows with their answers shuffled."""
        order = list(range(len(rows)))
        Random(0).shuffle(order)
        return shuffled(rows, order)
