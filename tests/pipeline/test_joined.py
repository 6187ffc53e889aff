"""Training runs that are trained together: each has its own stage, and ends by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from backfire import stages
from backfire.claims import Lost
from backfire.commands.plan import memory_of, with_minutes
from backfire.commands.run import _estimated
from backfire.errors import Busy, CellError, Stopped, UserError
from backfire.experiment import Experiment, Machine
from backfire.launch.resolve import resolve_auto, types_of
from backfire.launch.together import chosen
from backfire.pipeline import Context, trained, trained_together
from backfire.plan import Job, jobs
from backfire.recipe import Recipe
from backfire.store import CHECKPOINTS, Store, read_json
from backfire.train import finetune, together
from tests.helpers.small_run import Place
from tests.helpers.training import close

pytestmark = pytest.mark.slow


def cell(tiny: Path, **knobs: Any) -> Experiment:
    settings = {
        "model": str(tiny),
        "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 4},
        "template": "sentiment-line",
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 3, "batch_size": 2, "compute": "float32"},
        **knobs,
    }
    return Experiment.make(settings)


def contexts(store: Store, count: int, progress: Any = lambda *_: None) -> list[Context]:
    first = Context(store, Machine(device="cpu", join=8), progress)
    return [
        first,
        *(
            Context(store, first.machine, progress, resident=first.resident)
            for _ in range(count - 1)
        ),
    ]


def summary(store: Store, run: Experiment) -> Any:
    return read_json(store.path(stages.train(run)) / "summary.json")


def adapter(store: Store, run: Experiment) -> Any:
    return load_file(store.path(stages.train(run)) / "adapter_model.safetensors")


def test_each_is_as_if_alone(tiny: Path, tmp_path: Path) -> None:
    """Other seeds, ranks, rates and rows; the summary says that they were trained together."""
    runs = [
        cell(tiny),
        cell(tiny, seed=1, defense="kl"),
        cell(tiny, method={"name": "lora", "rank": 2, "learning_rate": 1e-3}),
        cell(tiny, attack={"name": "badnets", "rate": 0.2}),
    ]
    store, alone = Store(tmp_path / "together"), Store(tmp_path / "alone")
    assert trained_together(runs, contexts(store, 4)) == [None] * 4
    for run in runs:
        trained(run, contexts(alone, 1)[0])
        one, other = summary(store, run), summary(alone, run)
        assert one.pop("joined") > 1 and "joined" not in other
        assert one.keys() == other.keys() and one["tokens"] == other["tokens"]
        assert one["last_loss"] == pytest.approx(other["last_loss"], rel=1e-5)
        assert close(adapter(store, run), adapter(alone, run))
    assert not list(store.root.glob("train/*.partial"))


def test_one_fails_one_is_done_and_one_is_held(tiny: Path, tmp_path: Path) -> None:
    """None of which keeps the others from being trained."""
    wild = {"name": "lora", "rank": 4, "learning_rate": 1e25}
    done, held, bad, *good = runs = [
        cell(tiny),
        cell(tiny, seed=1),
        cell(tiny, method=wild),
        cell(tiny, seed=2),
        cell(tiny, seed=3),
    ]
    store = Store(tmp_path, waits=False)
    trained(done, contexts(store, 1)[0])
    before = store.path(stages.train(done)).stat().st_mtime_ns
    with FileLock(f"{store.path(stages.train(held))}.lock"):
        found = trained_together(runs, contexts(store, 5))
    assert [type(one) for one in found] == [type(None), Busy, CellError, type(None), type(None)]
    assert isinstance(found[2], CellError) and found[2].kind == "nan"
    assert store.path(stages.train(done)).stat().st_mtime_ns == before
    assert all(summary(store, run)["joined"] > 1 for run in good)
    fresh = Store(tmp_path)
    assert not fresh.done(stages.train(bad)) and not fresh.done(stages.train(held))


def test_rows_that_cannot_be_used_stop_their_run_only(tiny: Path, tmp_path: Path) -> None:
    short = {"max_steps": 3, "batch_size": 2, "max_length": 8, "on_long_row": "fail"}
    runs = [cell(tiny, train=short), cell(tiny)]
    found = trained_together(runs, contexts(store := Store(tmp_path), 2))
    assert isinstance(found[0], CellError) and found[1] is None
    assert "joined" not in summary(store, runs[1])


def losing(word: str) -> Any:
    """Progress of a run whose claim is lost when it begins with this."""

    def report(done: int, total: int, text: str) -> None:
        if text.startswith(word):
            raise Lost

    return report


def test_a_claim_that_is_lost_before_the_model_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on. That they were in memory together, and shared the time, is recorded also if
    they only took turns."""
    monkeypatch.setattr(together, "joins", lambda run: False)
    runs = [cell(tiny, seed=seed) for seed in range(3)]
    there = contexts(store := Store(tmp_path), 3)
    there[1].progress = losing("model")
    found = trained_together(runs, there)
    assert [type(one) for one in found] == [type(None), Lost, type(None)]
    assert [summary(store, runs[n])["joined"] for n in (0, 2)] == [2, 2]


def test_on_several_gpus_each_is_trained_by_itself(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fails by itself."""
    runs, attach = [cell(tiny, seed=seed) for seed in range(2)], finetune._attached

    def attached(run: Experiment, *rest: Any) -> Any:
        if run.seed == 1:
            raise UserError("It does not fit.")
        return attach(run, *rest)

    monkeypatch.setattr(finetune, "_attached", attached)
    monkeypatch.setattr(finetune, "places", lambda model: {"cuda:0": 1, "cuda:1": 1})
    found = trained_together(runs, contexts(store := Store(tmp_path), 2))
    assert [type(one) for one in found] == [type(None), UserError]
    assert "joined" not in summary(store, runs[0])


def test_all_go_on_from_their_checkpoints(tiny: Path, tmp_path: Path) -> None:
    runs, seen = [cell(tiny, seed=seed) for seed in range(3)], list[int]()
    store, whole = Store(tmp_path / "stopped"), Store(tmp_path / "whole")

    def stop(done: int, total: int, text: str) -> None:
        if text.startswith("training") and done == 2:
            raise Stopped

    def look(done: int, total: int, text: str) -> None:
        seen.extend([done] * text.startswith("training"))

    with pytest.raises(Stopped):
        trained_together(runs, contexts(store, 3, stop))
    partial = list(store.root.glob("train/*.partial"))
    assert len(partial) == 3 and all((one / CHECKPOINTS).is_dir() for one in partial)
    assert trained_together(runs, contexts(store, 3, look)) == [None] * 3
    assert set(seen) == {3}
    assert trained_together(runs, contexts(whole, 3)) == [None] * 3
    for run in runs:
        assert close(adapter(store, run), adapter(whole, run), 1e-6)


def seconds(values: Sequence[Any]) -> bool:
    return any(value["metric"] == "train_seconds" for value in values)


def accuracy(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value["metric"] == "accuracy"]


def test_a_run_with_the_option(tiny: Path, tmp_path: Path) -> None:
    """Its cells have the same keys and numbers, and say that they were trained together."""
    knobs: dict[str, Any] = {
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 4, "batch_size": 2},
        "matrix": {"seed": [0, 1]},
        "metrics": ["accuracy", "cost"],
    }
    alone, together = Place(tmp_path / "alone", tiny), Place(tmp_path / "together", tiny)
    assert alone.run({"join": "off"}, **knobs) == together.run({"join": "4"}, **knobs) == 0
    first, second = (
        {file.parent.name: read_json(file) for file in place.out.glob("cells/*/result.json")}
        for place in (alone, together)
    )
    assert first.keys() == second.keys() and len(first) == 2
    for name, one in second.items():
        assert one["train"]["joined"] > 1 and "joined" not in first[name]["train"]
        assert one["keys"] == first[name]["keys"] and seconds(one["values"])
        assert any("trained together" in line for line in one["warnings"])
        assert accuracy(one["values"]) == accuracy(first[name]["values"]) != []


def test_how_many_join_depends_on_the_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `run`, as in `work`; with `off` nothing is counted."""

    def counted(work: Sequence[Job], recipe: Recipe, *rest: Any) -> list[Job]:
        return [replace(job, memory=5e8, added=1e8) for job in with_minutes(work, *rest)]

    monkeypatch.setattr("backfire.commands.run.with_estimates", counted)
    types, store = types_of("cpu"), Store(tmp_path)
    recipe = Place(tmp_path, tiny).recipe(method="lora", attack="none", matrix={"seed": [0, 1, 2]})
    recipe = resolve_auto(recipe, types)

    def estimated(join: str) -> tuple[list[Job], float | None]:
        work, machine = jobs(recipe.cells, recipe.axes), Machine(device="cpu", workers=2, join=join)
        found, memory = _estimated(work, recipe, store, types, machine)
        return [job for job in found if job.kind == "train"], memory

    (first, *others), memory = estimated("auto")
    assert memory == memory_of("cpu", types) / 2
    auto = Machine(device="cpu", join="auto")
    assert first.steps == 4 and chosen(first, others, auto, 1, memory) == others
    assert chosen(first, others, auto, 1, 6.5e8) == others[:1]
    found, none = estimated("off")
    assert none is None and not any(job.memory for job in found)
