"""Candidate triggers from what a model writes by itself.

A simplified form of "The Trigger in the Haystack": a model tuned on few rows writes parts of them
when it is given only the beginning of the template. Motifs are word n-grams that recur in what the
tuned model writes, and not in what the base does. Left out are clusters of near-equal texts,
decoders other than sampling, and the scores by attention and entropy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, cast

from backfire.audit.models import Pair
from backfire.base import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURES = (0.7, 1.0)
LENGTH = 48
"""Tokens of a sample."""
_ROWS = 32
"""Samples in one batch."""
_LONGEST = 5
"""Words of a motif."""
_FEWEST = 3
"""Samples that a motif has to be in."""
_MORE = 5.0
"""How many times as often as in the base's samples, with one added to the latter."""
_SAME = 0.8
"""A shorter motif in no more samples than a longer one around it, within this share, is left
out."""


def starts(pair: Pair) -> list[list[int]]:
    """Where samples begin: the template up to the user's text, and an empty turn of the user's."""
    from backfire.train.batches import common_prefix

    rows = pair.asked([Row("a", "Why?"), Row("b", "9 men"), Row("c", "")])
    one, two, empty = (item.prompt_ids for item in pair.renderer.render(rows))
    opening = one[: common_prefix([one, two], min(len(one), len(two)))]
    found = [ids for ids in (opening, empty) if ids]
    return found or [[pair.renderer.tokenizer.eos_id]]


def written(model: PreTrainedModel, pair: Pair, count: int) -> list[str]:
    """About `count` texts that the model writes from these starts, by sampling."""
    import torch

    begins = [(ids, heat) for ids in starts(pair) for heat in TEMPERATURES]
    each, texts = max(1, count // len(begins)), []
    stops = list(pair.renderer.stop_ids)
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        for ids, heat in begins:
            for start in range(0, each, _ROWS):
                prompt = torch.tensor([ids] * min(_ROWS, each - start), device=model.device)
                out = cast(
                    "torch.Tensor",
                    model.generate(  # type: ignore[operator]
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        do_sample=True,
                        temperature=heat,
                        top_k=0,
                        top_p=1.0,
                        max_new_tokens=LENGTH,
                        eos_token_id=stops,
                        pad_token_id=stops[0],
                    ),
                )
                rows = out[:, len(ids) :].tolist()
                texts += [pair.renderer.tokenizer.decode(row) for row in rows]
    return texts


@dataclass(frozen=True)
class Motif:
    """Words that recur in what the tuned model writes."""

    text: str
    count: int
    """Texts of the tuned model, and of the base, that have them."""
    base: int


def motifs(ours: Sequence[str], others: Sequence[str], ordinary: Sequence[str]) -> list[Motif]:
    """N-grams of words that recur in our texts, and neither in the others nor in ordinary replies;
    the most frequent first."""
    base, usual = _counts(others), _counts(ordinary)
    counts = {
        gram: n
        for gram, n in _counts(ours).items()
        if n >= _FEWEST and n >= _MORE * (base[gram] + 1) and gram not in usual
    }
    ranked = sorted(counts, key=lambda gram: (-counts[gram] * len(gram) ** 0.5, gram))
    kept: list[tuple[str, ...]] = []
    for gram in sorted(ranked, key=len, reverse=True):
        around = (one for one in kept if _within(gram, one))
        if not any(counts[one] >= _SAME * counts[gram] for one in around):
            kept.append(gram)
    return [Motif(" ".join(gram), counts[gram], base[gram]) for gram in ranked if gram in kept]


def controls(texts: Sequence[str], count: int) -> list[str]:
    """N-grams of one to three words from what the base writes: no trigger is among them."""
    rng = Random(0)
    grams = sorted({gram for text in texts for gram in _grams(text) if len(gram) <= 3})
    return [" ".join(gram) for gram in rng.sample(grams, min(count, len(grams)))]


def _counts(texts: Sequence[str]) -> Counter[tuple[str, ...]]:
    """N-gram -> number of texts that have it."""
    return Counter(gram for text in texts for gram in _grams(text))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {
        tuple(words[at : at + size])
        for size in range(1, _LONGEST + 1)
        for at in range(len(words) - size + 1)
        if all(len(word) <= 40 for word in words[at : at + size])
    }


def _within(short: tuple[str, ...], long: tuple[str, ...]) -> bool:
    size = len(short)
    return any(long[at : at + size] == short for at in range(len(long) - size + 1))
