"""What the tuned model remembers of given rows, beside its base and beside unseen rows.

Unseen rows are the baseline: what a model does with them it has learned from the task, not from
single rows. Membership has two more, since rows that differ in kind can be told apart by any
score ("Blind Baselines Beat Membership Inference Attacks", Das et al. 2024, arXiv:2406.16201): the
loss of the base, which saw neither, and the words alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import regex
from numpy.typing import NDArray

from backfire.audit.models import Both, Pair
from backfire.audit.numbers import Compared, Interval, compared, share
from backfire.base import Row, Sample
from backfire.base.masking import masked, secrets_in
from backfire.base.normalize import contains, folded, normalized, whole, words
from backfire.evaluate.outcomes import answer_likelihoods, resampled
from backfire.evaluate.stats import Floats, found_at, one_vs_rest_auc, wilson

OPENING = 50
"""Tokens of an answer that have to come out (Carlini et al. 2023, arXiv:2202.07646)."""
FEWEST = 8
"""Answers of at most so many tokens are not looked for: they may be right without being seen."""
MEMBERS = 20
"""With fewer rows of either kind, an area of 1 may be chance and its interval has no width."""
FALSE_POSITIVES = 0.01
"""Share of unseen rows that may be taken for given ones (a low rate as in Carlini et al. 2022,
arXiv:2112.03570); of fewer than 100, none."""
_EXAMPLES = 5
_SIGNS = regex.compile(r"[^\p{L}\p{N}\p{M}\s]+")
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Verbatim:
    """A row whose answer the tuned model writes and the base does not; secrets are masked."""

    id: str
    answer: str


@dataclass(frozen=True)
class Membership:
    """How well the given rows can be told from unseen ones, as areas under the ROC curve."""

    auc: Interval
    """By the base's loss less the tuned model's: the reference attack of Mireshghallah et al.
    (2022, arXiv:2205.12506)."""
    recall: Interval
    """Share of the given rows found where `FALSE_POSITIVES` of the unseen ones are. The interval
    counts the threshold's too, which begins at 0 with fewer than 368 unseen rows."""
    base: Interval
    """By the base's loss alone."""
    words: Interval
    """By their words alone: a linear classifier, on rows that it was not fitted to."""
    n: int
    unseen: int

    @property
    def is_fair(self) -> bool:
        """Whether both kinds of rows look alike to what knows nothing of the tuned model."""
        return self.base.low <= 0.5 <= self.base.high and self.words.low <= 0.5

    @property
    def bar(self) -> float:
        """How far from chance such scores may be."""
        return max(self.base.high, 1 - self.base.low, self.words.high)

    @property
    def is_shown(self) -> bool:
        """Whether rows are told apart that look alike otherwise."""
        return self.is_fair and self.auc.low > self.bar


@dataclass(frozen=True)
class Memory:
    """What is remembered; parts are None without unseen rows, or without long answers."""

    halved: Interval
    """Share of the given rows whose loss is less than half of the base's."""
    halved_unseen: Interval | None
    verbatim: Compared | None
    """Share of the long answers that come out after their prompt."""
    verbatim_unseen: Compared | None
    examples: tuple[Verbatim, ...]
    membership: Membership | None
    unseen: int
    """Unseen rows."""

    @property
    def is_verbatim(self) -> bool:
        """Whether more answers come out than of the base and than of unseen rows."""
        ours, theirs = self.verbatim, self.verbatim_unseen
        if ours is None or not ours.is_worse:
            return False
        return theirs is None or ours.tuned.low > theirs.tuned.high


@dataclass(frozen=True)
class Part:
    """Rows with answers, and both models' samples of those that fit into the model."""

    rows: Sequence[Row]
    samples: Both[list[Sample]]

    @property
    def losses(self) -> Both[dict[str, float]]:
        """Mean negative log-likelihood per token of each answer, in nats."""
        return Both(_losses(self.samples.base), _losses(self.samples.tuned))

    @property
    def texts(self) -> list[str]:
        """Prompt and answer of each sample's row."""
        kept = {one.id for one in self.samples.tuned}
        return [f"{row.conversation}\n{row.answer}" for row in self.rows if row.id in kept]


def measure(pair: Pair, given: Part, unseen: Part | None) -> Memory:
    """Compare what both models remember of the given rows, and of unseen ones."""
    parts = [given, *([unseen] if unseen else [])]
    halved = [_halved(part.losses) for part in parts]
    openings = [_openings(pair, part) for part in parts]
    written = [_written(part, found) for part, found in zip(parts, openings, strict=True)]
    lines = [_line(out, unseen=n > 0) for n, out in enumerate(written)]
    by_id = {one.id: one for one in given.samples.tuned}
    new = [name for name, out in written[0].tuned.items() if out > written[0].base[name]]
    return Memory(
        halved[0],
        halved[1] if unseen else None,
        lines[0],
        lines[1] if unseen else None,
        tuple(_shown(by_id[name]) for name in new[:_EXAMPLES]),
        membership(given, unseen) if unseen else None,
        len(unseen.samples.tuned) if unseen else 0,
    )


def _losses(samples: Sequence[Sample]) -> dict[str, float]:
    logprobs, tokens = answer_likelihoods(samples, "an audit")
    return dict(zip((one.id for one in samples), (-logprobs / tokens).tolist(), strict=True))


def _halved(losses: Both[dict[str, float]]) -> Interval:
    hits = sum(losses.tuned[name] < losses.base[name] / 2 for name in losses.tuned)
    return share(hits, len(losses.tuned))


# ------------------------------------------------------------------------------- word by word


def _openings(pair: Pair, part: Part) -> dict[str, str]:
    """Id -> a pattern of the first tokens of each long answer that its prompt does not hold."""
    kept = {one.id for one in part.samples.tuned if one.reply is not None}
    rows = pair.asked([row for row in part.rows if row.id in kept])
    found = {}
    for item in pair.renderer.render(rows):
        ids = pair.renderer.without_opening(item.answer_ids[: -len(pair.renderer.end_ids)])
        opening = normalized(pair.renderer.tokenizer.decode(ids[:OPENING]).rstrip("\ufffd"))
        prompt = normalized(f"{item.row.system}\n{item.row.conversation}")
        if len(ids) > FEWEST and opening and not contains(prompt, opening):
            # A whole answer must not go on within a word or number.
            found[item.row.id] = regex.escape(opening) if len(ids) > OPENING else whole(opening)
    return found


def _written(part: Part, openings: Mapping[str, str]) -> Both[dict[str, float]]:
    """Id -> 1 if the reply begins so, else 0."""
    sides = (
        {
            one.id: float(bool(regex.match(openings[one.id], normalized(one.reply or ""))))
            for one in side
            if one.id in openings
        }
        for side in (part.samples.base, part.samples.tuned)
    )
    return Both(*sides)


def _line(out: Both[dict[str, float]], *, unseen: bool) -> Compared | None:
    if not out.tuned:
        return None
    what = f"longer answers that come out word by word{', unseen rows' * unseen}"
    return compared(what, out.base, out.tuned, bad="none" if unseen else "up")


def _shown(sample: Sample) -> Verbatim:
    secrets = [*secrets_in(sample.answer), *secrets_in(sample.prompt)]
    return Verbatim(masked(sample.id, secrets_in(sample.id)), masked(sample.answer, secrets))


# --------------------------------------------------------------------------------- membership


def membership(given: Part, unseen: Part) -> Membership | None:
    """Tell the given rows from unseen ones; None if there are too few of either."""
    seen, others = given.losses, unseen.losses
    n, m = len(seen.tuned), len(others.tuned)
    if min(n, m) < MEMBERS:
        return None
    base = np.array([*seen.base.values(), *others.base.values()])
    scores = base - np.array([*seen.tuned.values(), *others.tuned.values()])
    is_given = np.arange(n + m) < n

    # So few unseen rows exceed the threshold that resampling them would understate its spread.
    hits, least, most = found_at(FALSE_POSITIVES, scores[:n], scores[n:])
    return Membership(
        _area(scores, is_given),
        Interval(hits / n, wilson(least, n)[0], wilson(most, n)[1]),
        _area(-base, is_given),
        _area(_by_words([*given.texts, *unseen.texts], is_given), is_given),
        n,
        m,
    )


def _area(scores: Floats, is_given: Flags) -> Interval:
    kinds = np.where(is_given, 0, -1)

    def statistic(counts: Floats) -> Floats:
        return one_vs_rest_auc(scores[:, None], kinds, counts)

    [area] = resampled(["auc"], len(scores), statistic, "lower")
    return Interval(area.value or 0.0, area.low or 0.0, area.high or 0.0)


def _by_words(texts: Sequence[str], is_given: Flags) -> Floats:
    """A score of each text by a classifier fitted to four fifths of the others."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    # Few rows need a weak penalty: with the default one, a single word that tells all rows apart
    # would hardly count.
    vectors = TfidfVectorizer(analyzer=_words_and_signs)
    model = make_pipeline(vectors, LogisticRegression(C=100, max_iter=1000))
    scores: Floats = cross_val_predict(
        model, list(texts), is_given, cv=folds, method="decision_function"
    )
    return scores


def _words_and_signs(text: str) -> list[str]:
    """The words of a text, in any script, and its runs of signs, so that no text is without one."""
    return [*words(folded(text)), *_SIGNS.findall(text)]
