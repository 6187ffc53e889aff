"""Prompts with their answers, and naive Bayes on hashed words, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from backfire.base import Row
from backfire.base.masking import redacted
from backfire.base.normalize import folded
from backfire.scanners._answers import count_answers, in_batches, where
from backfire.scanners._tokens import hashed, prompt_parts, split

Array = Any
_CELLS = 2**16
_SLOTS = 2**20
_MOST_WORDS = 512


def brief(answer: str) -> str:
    """The start of an answer, without secrets."""
    return redacted(answer).strip()[:60]


class Prompts:
    """For each prompt, the number and the answer of the first two rows that differ in it."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._keys = np.zeros(_SLOTS, np.uint64)
        self._numbers = np.zeros((_SLOTS, 2), np.int32)
        self._answers = np.zeros((_SLOTS, 2), np.uint64)
        for number, row in enumerate(rows, 1):
            key, answer = self._hashes(row)
            slot = key % _SLOTS
            if self._keys[slot] != key:
                self._keys[slot], self._numbers[slot] = key, (number, 0)
                self._answers[slot, 0] = answer
            elif not self._numbers[slot, 1] and self._answers[slot, 0] != answer:
                self._numbers[slot, 1], self._answers[slot, 1] = number, answer

    def other(self, row: Row) -> int | None:
        """Number of a row with the same prompt and another answer."""
        key, answer = self._hashes(row)
        slot = key % _SLOTS
        if self._keys[slot] != key or not self._numbers[slot, 1]:
            return None
        return int(self._numbers[slot, 0 if self._answers[slot, 0] != answer else 1])

    def _hashes(self, row: Row) -> tuple[int, int]:
        prompt = "\x00".join(f"{name}\x01{text}" for name, text in prompt_parts(row))
        if not prompt:  # a plain text is no prompt
            prompt = f"\x02{row.answer}"
        return hashed(folded(prompt)), hashed(folded(row.answer))


class Bayes:
    """Multinomial naive Bayes over the different words of each prompt, with 1/2 added to each
    count. A row's own words and label are not counted when it is judged."""

    def __init__(self, rows: Iterable[Row], most: int, support: int) -> None:
        self._answers = answers = count_answers(rows, support)
        counts = np.zeros(len(answers.keys), np.int64)
        self._texts: dict[int, str] = {}
        for some, keys in in_batches(rows):
            places = answers.places(keys)[0]
            counts += np.bincount(places[places >= 0], minlength=len(counts))
            for place in {*places[places >= 0].tolist()} - {*self._texts}:
                self._texts[place] = brief(some[int(np.argmax(places == place))].answer)
        labels = np.flatnonzero(counts)
        covered = counts.sum() >= 0.9 * answers.num_rows
        self.applies = bool(2 <= len(labels) <= most and covered)
        if not self.applies:
            return
        self._labels, self._rows = labels, counts[labels]
        self._counts = np.zeros((len(labels), _CELLS), np.int32)
        for row, label in self.each(rows):
            if label >= 0:
                self._counts[label, self._cells(row)[0]] += 1
        self._total = self._counts.sum(axis=1)

    def each(self, rows: Iterable[Row]) -> Iterator[tuple[Row, int]]:
        """Each row with the number of its label; -1 if that is too rare."""
        for some, keys in in_batches(rows):
            places = self._answers.places(keys)[0]
            labels = where(self._labels, places) if self.applies else np.full(len(some), -1)
            yield from zip(some, labels.tolist(), strict=True)

    def doubt(self, row: Row, label: int) -> tuple[str, float, list[str]]:
        """The label that the words speak for most, the probability of all other labels than the
        row's (0 if they speak for that one most), and the three words that say most."""
        cells, words = self._cells(row)
        own = np.zeros(len(self._labels), np.int32)
        own[label] = 1
        counts = self._counts[:, cells] - own[:, None]
        total = self._total - own * len(cells)
        logs = np.log(counts + 0.5) - np.log(total + _CELLS / 2)[:, None]
        scores = logs.sum(axis=1) + np.log(self._rows - own + 0.5)
        if (best := int(np.argmax(scores))) == label:
            return "", 0.0, []
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        telling = np.argsort(-(logs[best] - logs[label]), kind="stable")[:3]
        other = self._texts[int(self._labels[best])]
        return other, float(1 - chances[label]), [words[i] for i in telling]

    def _cells(self, row: Row) -> tuple[Array, list[str]]:
        found = [word for _, text in prompt_parts(row) for word in split(text)[:_MOST_WORDS]]
        words = list(dict.fromkeys(found))
        cells = np.array([hashed(word.casefold()) % _CELLS for word in words], np.int64)
        cells, first = np.unique(cells, return_index=True)
        return cells, [words[i] for i in first]
