"""A killed training run resumes from its checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backfire.base import Rendered
from backfire.errors import exit_class
from backfire.store import read_json
from backfire.train import checkpoint
from backfire.train.loop import TrainingRun
from tests.helpers.loop import METHODS, fresh
from tests.helpers.training import Kill, equal, killed_at, run, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, items: list[Rendered], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SimpleNamespace]:
    out = {}
    for method in METHODS:
        cell = fresh(tiny, items, tmp_path_factory.mktemp(method), method)
        summary = run(cell)
        out[method] = SimpleNamespace(weights=weights(cell.model), log=cell.log, summary=summary)
    return out


def same(cell: TrainingRun, expected: SimpleNamespace) -> bool:
    moved = weights(cell.model)
    return moved.keys() == expected.weights.keys() and all(
        torch.equal(moved[name], weight) for name, weight in expected.weights.items()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kills", [[1], [2], [6], [10], [3, 4, 9]], ids=str)
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    method: str,
    kills: list[int],
    tiny: Path,
    items: list[Rendered],
    tmp_path: Path,
    uninterrupted: dict[str, SimpleNamespace],
) -> None:
    for step in kills:
        with pytest.raises(Kill):
            run(
                fresh(tiny, items, tmp_path, method), checkpoint_seconds=0, progress=killed_at(step)
            )
    cell, steps = fresh(tiny, items, tmp_path, method), list[int]()
    summary = run(cell, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == max(1, kills[-1]), "it goes on from the last checkpoint, not from the start"
    expected = uninterrupted[method]
    assert same(cell, expected)
    assert cell.log == expected.log
    for last in sorted((tmp_path / "checkpoints").glob("0*"))[-1:]:
        before = read_json(last / "state.json")["seconds"]
        assert summary["seconds"] >= round(before, 2) > 0, "the time before it counts too"
    timing = {"seconds", "peak_memory_mb"}
    assert {k: v for k, v in summary.items() if k not in timing} == {
        k: v for k, v in expected.summary.items() if k not in timing
    }


def test_the_newest_two_checkpoints_are_kept(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    with pytest.raises(Kill):
        cell = fresh(tiny, items, tmp_path, "lora")
        run(cell, checkpoint_seconds=0, progress=killed_at(6))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000005"]


def test_a_checkpoint_of_another_run_is_refused(
    tiny: Path, items: list[Rendered], tmp_path: Path, uninterrupted: dict[str, SimpleNamespace]
) -> None:
    with pytest.raises(Kill):
        other = fresh(tiny, items, tmp_path, "lora", name="other", learning_rate=0.1)
        run(other, checkpoint_seconds=0, progress=killed_at(9))
    messages: list[str] = []
    cell = fresh(tiny, items, tmp_path, "lora")
    with pytest.raises(Kill):
        run(
            cell,
            checkpoint_seconds=0,
            progress=lambda done, total, text: (
                messages.append(text) or killed_at(3)(done, total, text)
            ),
        )
    assert [text for text in messages if "is of another run (other)" in text]
    # Its own checkpoints are younger in steps, and must not be the ones thrown away.
    again = fresh(tiny, items, tmp_path, "lora")
    steps: list[int] = []
    run(again, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3
    assert same(again, uninterrupted["lora"])


def test_a_checkpoint_of_another_optimizer_is_refused(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """A paged optimizer on a GPU is another one than without a GPU."""
    for first, second in (("adamw", "adamw-8bit"), ("adamw-8bit", "adamw")):
        folder, messages = tmp_path / first, list[str]()
        with pytest.raises(Kill):
            cell = fresh(tiny, items, folder, "lora", optimizer=first, max_steps=4)
            run(cell, checkpoint_seconds=0, progress=killed_at(3))
        again = fresh(tiny, items, folder, "lora", optimizer=second, max_steps=4)
        run(again, progress=lambda done, total, text, to=messages: to.append(text))
        assert sum("is of another kind of AdamW; ignoring it" in text for text in messages) == 2
        whole = fresh(
            tiny, items, tmp_path / f"whole {second}", "lora", optimizer=second, max_steps=4
        )
        run(whole)
        assert equal(again.weights(), whole.weights())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", ["optimizer.pt", "guards.pt"])
def test_a_disk_that_is_full_at_a_checkpoint_is_named(
    name: str, tiny: Path, items: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch, given a path, may only say `basic_ios::clear: iostream error`."""
    cell = fresh(tiny, items, tmp_path, next(iter(METHODS)))

    def fill_up(weights: object, path: str) -> None:
        Path(path).with_name(name).symlink_to("/dev/full")

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    with pytest.raises(OSError) as caught:
        run(cell, checkpoint_seconds=0)
    assert exit_class(caught.value)[0] == "disk-full"
