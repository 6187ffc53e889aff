"""Runs of one base in one pass end as each does alone."""

from __future__ import annotations

import errno
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import Rendered
from backfire.claims import Lost
from backfire.errors import CellError, Stopped
from backfire.model.fan import fanned, twin
from backfire.model.load import load_base, save_tuned, with_adapters
from backfire.progress import silent
from backfire.registry import build
from backfire.store import CHECKPOINTS
from backfire.train import checkpoint, steps, together
from backfire.train.loop import TrainingRun
from tests.helpers.together import CELLS, SHORT, alone, bases, each, joined, new
from tests.helpers.training import CPU, close, equal, norm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_runs_together_end_as_alone(
    method: str, tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """With other ranks, rates, seeds, rows and numbers of steps."""
    cells = each(tiny, items, tmp_path / "joined", method=method)
    ends = joined(cells)
    for cell, settings, end in zip(cells, CELLS, ends, strict=True):
        [one] = each(tiny, items, tmp_path / "alone", [settings], method=method)
        summary = alone(one)
        assert close(cell.weights(), one.weights())
        assert end["last_loss"] == pytest.approx(summary["last_loss"], rel=1e-5)
        for name in ("steps", "rows", "tokens", "supervised_tokens"):
            assert end[name] == summary[name]


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_in_several_pieces_end_as_alone(
    rows: int, tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """A pass may have several pieces of a run: all of them count."""
    cells = each(tiny, items, tmp_path / "joined", SHORT[:2])
    ends = joined(cells, micro_batch=rows)
    for cell, settings, end in zip(cells, SHORT, ends, strict=False):
        [one] = each(tiny, items, tmp_path / "alone", [settings])
        assert end["last_loss"] == pytest.approx(alone(one)["last_loss"], rel=1e-5)
        assert close(cell.weights(), one.weights())
        assert len(cell.micro_batches._passes) == math.ceil(settings[3] / rows), "of one step"


def test_in_16_bits_they_differ_by_rounding_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    cells = each(tiny, items, tmp_path / "joined", SHORT, compute="bfloat16")
    joined(cells, "bfloat16")
    exactly = each(tiny, items, tmp_path / "float32", SHORT)
    joined(exactly)
    for cell, near, settings in zip(cells, exactly, SHORT, strict=True):
        [one] = each(tiny, items, tmp_path / "alone", [settings], compute="bfloat16")
        alone(one, "bfloat16")
        rounding = distance(one, near)
        assert distance(cell, near) < 2 * rounding


def distance(one: TrainingRun, other: TrainingRun) -> float:
    own, others = one.weights(), other.weights()
    return norm({name: own[name] - others[name] for name in own})


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_nan_in_one_run_does_not_change_a_bit_of_its_neighbors(
    method: str, compute: str, tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """In the step where it appears; later the run is gone, and sums are rounded otherwise."""
    cells = [(4, 1e-3, seed, 4, 1) for seed in (5, 6, 7)]
    found = []
    for broken in (False, True):
        folder = tmp_path / f"{broken}"
        runs = each(tiny, items, folder, cells, method=method, compute=compute)
        if broken:
            for weight in runs[1].trainable.values():
                weight.data[0, 0] = math.nan
        ends = joined(runs, compute)
        assert isinstance(ends[1], CellError) == broken
        assert not broken or "not finite" in str(ends[1])
        found.append([runs[0].weights(), runs[2].weights()])
    for one, other in zip(*found, strict=True):
        assert equal(one, other)


def test_a_run_that_fails_later_leaves_the_others_as_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    cells = [SHORT[0], (4, 1e20, 6, 6, 12), SHORT[2]]
    runs = each(tiny, items, tmp_path / "joined", cells)
    ends = joined(runs)
    assert isinstance(ends[1], CellError) and ends[1].kind == "nan"
    for number in (0, 2):
        [one] = each(tiny, items, tmp_path / "alone", [cells[number]])
        alone(one)
        assert close(runs[number].weights(), one.weights())


def test_runs_that_were_stopped_go_on_together_or_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    whole = each(tiny, items, tmp_path / "whole", SHORT)
    joined(whole)

    def stop(done: int, total: int, text: str) -> None:
        if done == 4:
            raise Stopped

    runs = each(tiny, items, tmp_path / "stopped", SHORT)
    with pytest.raises(Stopped):
        joined(runs, progress=[silent, stop, silent])
    seen = list[int]()
    again = each(tiny, items, tmp_path / "stopped", SHORT)
    joined(again[:2], progress=[lambda done, *_: seen.append(done), silent])
    assert seen[0] == 5
    alone(again[2])
    for one, other in zip(again, whole, strict=True):
        assert close(one.weights(), other.weights())


def test_a_run_whose_claim_is_lost_leaves_the_others(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    def lose(done: int, total: int, text: str) -> None:
        if done == 3:
            raise Lost

    runs = each(tiny, items, tmp_path, SHORT)
    ends = joined(runs, progress=[silent, lose, silent])
    assert isinstance(ends[1], Lost) and runs[1].step == 3
    assert isinstance(ends[0], dict) and isinstance(ends[2], dict)


@pytest.mark.parametrize(
    ("place", "name"),
    [(together, "answer_logits"), (together, "loss_of"), (steps, "penalized")],
    ids=["passes", "losses", "penalties"],
)
def test_where_memory_runs_out_they_go_on_one_by_one(
    place: Any,
    name: str,
    tiny: Path,
    items: list[Rendered],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = each(tiny, items, tmp_path / "joined", SHORT)
    real, tries = getattr(place, name), list[None]()

    def scarce(*given: Any) -> Any:
        tries.append(None)
        if len(tries) == 3:
            raise torch.OutOfMemoryError
        return real(*given)

    monkeypatch.setattr(place, name, scarce)
    ends = joined(runs)
    assert place is steps or len(tries) == 3, "no later pass has several runs"
    assert [end["steps"] for end in ends] == [cell[4] for cell in SHORT]
    [one] = each(tiny, items, tmp_path / "alone", SHORT[:1])
    alone(one)
    assert close(runs[0].weights(), one.weights())


def test_a_run_that_waits_for_the_others_keeps_its_steps(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """And notices that its claim is lost."""
    seen = list[int]()

    def look(done: int, total: int, text: str) -> None:
        seen.append(done)
        if seen.count(total) == 2:
            raise Lost

    runs = each(tiny, items, tmp_path, [SHORT[0], SHORT[2]])
    ends = joined(runs, progress=[silent, look])
    assert isinstance(ends[0], dict) and isinstance(ends[1], Lost)
    assert seen == [1, 2, 3, 4, 5, 6, 6]
    kept = [[*(run.folder / CHECKPOINTS).glob("*")] for run in runs]
    assert [[one.name for one in own] for own in kept] == [[], ["00000006"]]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(
    tiny: Path, items: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, real = each(tiny, items, tmp_path, SHORT), checkpoint.save

    def save(run: TrainingRun) -> None:
        if run is runs[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(run)

    monkeypatch.setattr(checkpoint, "save", save)
    ends = joined(runs, checkpoint_seconds=0)
    assert [type(end) for end in ends] == [dict, OSError, dict] and runs[1].step == 1


def test_a_defense_that_defines_the_step_takes_its_steps_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    rows = {"user": items[:20], "align": items[20:30], "harmful": items[30:]}
    models = bases(tiny, "lora", 3)
    cell = (4, 1e-3, 5, 4, 6)
    defenses = [None, "vaccine", None]
    runs = [
        new(model, rows, tmp_path / f"{n}", cell, defense=defense)
        for n, (model, defense) in enumerate(zip(models, defenses, strict=True))
    ]
    assert [together.joins(run) for run in runs] == [True, False, True]
    joined(runs)
    one = new(*bases(tiny, "lora", 1), rows, tmp_path / "alone", cell, defense="vaccine")
    alone(one)
    assert close(runs[1].weights(), one.weights())


def test_weights_outside_of_the_divided_layers_keep_a_run_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """An embedding's, and those of layers that DoRA below keeps from being divided."""
    embeds = {"name": "lora", "targets": ["q_proj", "embed_tokens"]}
    runs = each(tiny, items, tmp_path / "embeds", SHORT[:1], method=embeds)
    for dora in (False, True):
        below, folder = build("methods", {"name": "lora", "dora": dora}), tmp_path / f"{dora}"
        folder.mkdir()
        save_tuned(below.attach(*bases(tiny, "lora", 1), 0), folder, tiny, None)
        change = partial(with_adapters, adapter=None, below=folder)
        runs += each(tiny, items, folder / "run", SHORT[:1], change=change)
    assert [together.joins(run) for run in runs] == [False, True, False]


def test_a_run_that_cannot_pack_does_not_keep_the_others_apart(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    runs = each(tiny, items, tmp_path, SHORT)
    runs[1].layout.longest_packed = 0
    assert all(isinstance(end, dict) for end in joined(runs))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_weights_of_the_base_are_in_memory_once(kind: torch.dtype, tiny: Path) -> None:
    base = load_base(tiny, kind, CPU)
    bare = [base, twin(base), twin(base)]
    models = [build("methods", "lora").attach(model, 0) for model in bare]

    def places() -> set[int]:
        return {
            module.base_layer.weight.untyped_storage().data_ptr()
            for model in models
            for module in model.modules()
            if hasattr(module, "lora_A")
        }

    once = len(places())
    before = {name: p.clone() for name, p in base.named_parameters()}
    with fanned(models, "bfloat16"):
        assert len(places()) == once
    assert len(places()) == once
    for name, weight in base.named_parameters():
        assert torch.equal(weight, before[name])


def test_adapters_in_different_layers_are_refused(tiny: Path) -> None:
    base, second = bases(tiny, "lora", 2)
    one = build("methods", "lora").attach(base, 0)
    other = build("methods", {"name": "lora", "targets": ["q_proj"]}).attach(second, 0)
    with pytest.raises(ValueError, match="different layers"), fanned([one, other], "float32"):
        pass


def test_on_an_8_bit_base_every_run_is_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """Its kernel rounds by the largest inputs of all tokens that it is given."""
    runs = each(tiny, items, tmp_path, SHORT, method="lora-int8")
    assert not any(map(together.joins, runs))
