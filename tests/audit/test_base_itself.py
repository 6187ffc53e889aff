"""A model that is all base has the numbers of its base, and nothing stands out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backfire.audit import behavior, monitor, task, triggers
from backfire.audit.engine import Asked, _words
from backfire.audit.models import Pair
from backfire.audit.numbers import Compared
from backfire.audit.probes import EVERYDAY
from backfire.base import Row
from backfire.data.render import Renderer
from backfire.model.resident import Source
from backfire.pipeline import Context
from backfire.registry import build
from backfire.store import Store
from backfire.tokenizer import load_tokenizer
from tests.helpers.audited import TRIGGER, plain
from tests.helpers.training import CPU


@pytest.fixture
def pair(tiny: Path, tmp_path: Path) -> Pair:
    """What `open_pair` refuses to make."""
    source = Source(tiny, torch.float32, CPU)
    shown = Renderer(build("templates", "raw"), load_tokenizer(tiny), 128)
    return Pair(source, source, None, shown, Context(Store(tmp_path)))


def unchanged(numbers: tuple[Compared, ...]) -> bool:
    return all(
        one.base == one.tuned
        and one.change.value == 0
        and one.change.low <= 0 <= one.change.high
        and not one.is_worse
        for one in numbers
    )


def test_behavior_and_task_are_unchanged(pair: Pair) -> None:
    requests = [Row(f"q{n}", f"ask {n} for it", fields={"sealed": "yes"}) for n in range(6)]
    found = behavior.compare(pair, requests, requests[:3], build("judges", "refusal-keywords"), 8)
    assert len(found.numbers) >= 3 and unchanged(found.numbers)
    # Both lists may have the same ids.
    assert [one.n for one in found.numbers] == [6, 6, 6, 3, 9]
    rows = plain()
    unseen = [replace(row, instruction=f"{row.instruction} now") for row in rows]
    learned = task.compare(pair, rows, unseen)
    assert len(learned.numbers) == 4 and unchanged(learned.numbers)
    for loss in learned.numbers[1::2]:
        assert (loss.unit, loss.change.low, loss.change.high) == ("nats", 0, 0)
    memory = learned.memory
    assert memory.halved.value == 0 and memory.examples == () and not memory.is_verbatim
    assert memory.membership and memory.membership.auc.value == 0.5
    assert not memory.membership.is_shown


def test_no_trigger_stands_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROBES": 10, "CONTROLS": 3}.items():
        monkeypatch.setattr(triggers, name, value)
    found = triggers.search(pair, plain(), [TRIGGER])
    assert found.tried and not any(one.stands_out for one in found.tried)
    assert not any(one.stands_out for one in found.leaks)
    watched = monitor.watch(pair, [], plain(), [], {}, 8)
    assert watched.why_not and not watched.rows


def test_a_trigger_in_front_and_inside_is_flagged_apart() -> None:
    both = triggers._both_places("zq", "given")
    words = _words(triggers.Triggers((), (), 0.0, 4, (), tuple(both)))
    assert [*words][1:] == ["with “zq” (given)", "with “zq” (given, inside)"]


def test_rows_without_a_prompt_are_not_asked() -> None:
    texts = [Row("a", "", answer="a sentence to learn"), Row("b", " \n")]
    assert Asked(rows=texts).ordinary == [*EVERYDAY]
    assert Asked(rows=[*texts, Row("c", "Why?")]).ordinary == [Row("c", "Why?")]
