"""Equal exchanges are judged once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from backfire.base import Exchange, Judge, Verdict
from backfire.errors import CellError
from backfire.evaluate.verdicts import judged
from tests.helpers.judging import exchange, make_judge


class Counting(Judge):
    """Says yes to replies with a y; remembers what it was asked."""

    name: ClassVar[str] = "counting"
    reads: ClassVar[tuple[str, ...]] = ("tone",)
    asked: ClassVar[list[Exchange]] = []
    fails_after: ClassVar[int] = 10**9
    knob: int = 0
    """Part of the identity."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        if len(self.asked) >= self.fails_after:
            raise CellError("failed", "gone")
        self.asked.extend(exchanges)
        return [
            Verdict(None, None, "hm\ud83d") if e.reply == "?" else Verdict(1.0, "y" in e.reply)
            for e in exchanges
        ]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(Counting, "asked", [])
    return Counting


def test_equal_exchanges_are_judged_once_and_never_again(
    counting: type[Counting], tmp_path: Path
) -> None:
    replies = ["yes", "no", "yes", "?", "yes", "no"]
    judge, asked = counting(), [exchange(reply) for reply in replies]
    verdicts = judged(judge, asked, tmp_path / "verdicts")
    assert [v.positive for v in verdicts] == [True, False, True, None, True, False]
    assert [e.reply for e in judge.asked] == ["yes", "no", "?"]
    assert judged(judge, asked, tmp_path / "verdicts") == verdicts, "the undecided one too"
    assert len(judge.asked) == 3


def test_another_identity_prompt_or_field_is_judged_anew(
    counting: type[Counting], tmp_path: Path
) -> None:
    plain = exchange("yes", tone="soft", other="a")
    judged(counting(), [plain], tmp_path)
    judged(counting(), [exchange("yes", tone="soft", other="b")], tmp_path)
    assert len(counting.asked) == 1
    judged(counting(), [exchange("yes", tone="loud")], tmp_path)
    judged(counting(), [exchange("yes", "Another.", tone="soft")], tmp_path)
    judged(counting(knob=1), [plain], tmp_path)
    assert len(counting.asked) == 4


def test_an_interruption_costs_one_batch(
    counting: type[Counting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [exchange(f"y{index}") for index in range(10)]
    monkeypatch.setattr(counting, "fails_after", 6)
    with pytest.raises(CellError, match="gone"):
        judged(counting(), asked, tmp_path, batch_size=3)
    monkeypatch.setattr(counting, "fails_after", 10**9)
    assert len(judged(counting(), asked, tmp_path, batch_size=3)) == 10
    assert [e.reply for e in counting.asked] == [f"y{index}" for index in range(10)]


def test_a_torn_line_is_judged_again(counting: type[Counting], tmp_path: Path) -> None:
    asked = [exchange("yes"), exchange("no")]
    verdicts = judged(counting(), asked, tmp_path)
    [file] = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20] + b"")
    for count in (3, 3):
        assert judged(counting(), asked, tmp_path) == verdicts
        assert len(counting.asked) == count


def test_connection_knobs_are_excluded_from_the_identity() -> None:
    for name in ("rubric", "yes-no", "classifier"):
        cls = type(make_judge(name))
        assert cls.unhashed <= set(cls.model_fields)
    patient = make_judge("rubric", retries=9, concurrency=1, timeout_seconds=5.0)
    assert patient.identity() == make_judge("rubric").identity()
    assert make_judge("rubric", model="other").identity() != make_judge("rubric").identity()
