"""Counts in bounded memory keep their stated errors."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np

from backfire.base import Row
from backfire.scanners._grams import Grams
from backfire.scanners._lift import pairs_of
from backfire.scanners._sketches import CountMin, Frequent


def test_a_count_is_never_too_low_and_rarely_much_too_high() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 5000, dtype=np.uint64)
    stream = hashes[rng.zipf(1.5, 60_000) % 5000]
    sketch = CountMin(2000)
    cells = 1 << sketch.bits
    for part in np.array_split(stream, 7):
        sketch.add(part)
    true = Counter(stream.tolist())
    error = sketch.count(hashes).astype(int) - np.array([true[int(h)] for h in hashes])
    assert error.min() >= 0
    assert (error > 2.72 * len(stream) / cells).mean() < 0.14


def test_with_enough_cells_counts_are_exact() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**63, 3000, dtype=np.uint64)
    sketch = CountMin(300_000)
    sketch.add(np.repeat(hashes, 3))
    assert (sketch.count(hashes) == 3).mean() > 0.999
    tails = sketch.tails()
    assert len(tails) >= 4 and (tails[1:4] >= 2900).all() and (tails[1:4] <= 3000).all()
    assert not tails[7:].any()


def test_frequent_keys_are_kept_within_the_bound() -> None:
    rng = Random(2)
    keys = [
        rng.randrange(50) if rng.random() < 0.3 else rng.randrange(10**9) for _ in range(50_000)
    ]
    sketch, true = Frequent(500), Counter(keys)
    for start in range(0, len(keys), 1000):
        sketch.add(keys[start : start + 1000])
        assert len(sketch.counts) <= 1000 + 1000
    for key in range(50):
        assert true[key] - len(keys) / 500 <= sketch.counts[key] <= true[key]


def test_of_many_words_the_same_pairs_are_counted_in_each_row() -> None:
    words = [f"w{n}" for n in range(90)]
    rows = [Row(f"{n}", " ".join([f"x{n}", *words[n:], *words[:n]])) for n in range(20)]
    [batch] = Grams(rows, 1, 512)
    known, counts = np.unique(batch.gram, return_counts=True)
    pairs = pairs_of(batch, known[counts == 20])
    assert set(np.unique(pairs.gram, return_counts=True)[1]) == {20}
    assert len(pairs.gram) == 20 * 60 * 59 // 2
