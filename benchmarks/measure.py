"""Times both sides in alternation."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from benchmarks import baseline_eval, trl_trainer
from benchmarks.cells import Cell
from benchmarks.equality import GROUPED, TRL, Round, compare
from benchmarks.sides import NAMES, Time, side

T = TypeVar("T")


@dataclass
class Clock:
    """Times by phase and side, one per repetition."""

    times: dict[str, dict[str, list[Time]]] = field(default_factory=dict)

    def add(self, phase: str, who: str, time: Time) -> None:
        self.times.setdefault(phase, {}).setdefault(who, []).append(time)

    def alternate(
        self, phase: str, repetition: int, work: Mapping[str, Callable[[], T]]
    ) -> dict[str, T]:
        """Run all in order, or in reverse order in odd repetitions; return the results by side."""
        out = {}
        for who in list(work) if repetition % 2 == 0 else list(work)[::-1]:
            gc.collect()
            begin = Time.now()
            out[who] = work[who]()
            self.add(phase, who, Time.now().since(begin))
        return out

    def summary(self, unit: Literal["wall", "cpu"]) -> dict[str, Any]:
        """All seconds, their medians, and the ratios of baseline to backfire."""
        seconds = {
            phase: {who: [round(getattr(t, unit), 4) for t in times] for who, times in by.items()}
            for phase, by in self.times.items()
        }
        medians = {
            phase: {who: median(times) for who, times in by.items()}
            for phase, by in seconds.items()
        }
        ratios = {phase: round(by["baseline"] / by["backfire"], 3) for phase, by in medians.items()}
        for phase, by in medians.items():
            for who in by.keys() - {*NAMES}:
                ratios[f"{phase}, {who}"] = round(by[who] / by["backfire"], 3)
        return {"seconds": seconds, "medians": medians, "ratios": ratios}


def measure(
    cell: Cell, folder: Path, repetitions: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds, medians, ratios and equality; every training run of a side gives the same model."""
    log(f"{cell.title}: warm-up")
    _round(cell.warm_up(), Clock(), 0, folder)
    clock = Clock()
    for repetition in range(repetitions):
        log(f"{cell.title}: {repetition + 1} of {repetitions}")
        last = _round(cell, clock, repetition, folder)
    return {
        **clock.summary("wall"),
        "cpu": clock.summary("cpu"),
        "equality": compare(cell, last, folder),
        "tokens": tokens(cell),
        "parameters": side("baseline").load(cell, cell.base).num_parameters(),
    }


def _round(cell: Cell, clock: Clock, repetition: int, folder: Path) -> Round:
    """Train on both sides; then both sides evaluate the weights that backfire saved."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    both = {name: side(name) for name in NAMES}
    trains = {name: partial(work.train, cell, folder / name) for name, work in both.items()}
    if trl_trainer.installed():
        trains[TRL] = partial(trl_trainer.train, cell, folder / TRL)
    training = clock.alternate("train", repetition, trains)
    for name, result in training.items():
        clock.add("training loop", name, result.steps)
    tuned = {name: work.load(cell, folder / "backfire") for name, work in both.items()}
    base = {name: work.load(cell, cell.base) for name, work in both.items()}
    attention = {model.config._attn_implementation for model in tuned.values()}
    if attention != {"sdpa"}:
        raise RuntimeError(f"Attention must be sdpa on both sides, not {attention}.")
    scoring = {name: partial(work.scores, cell, tuned[name]) for name, work in both.items()}
    scoring[GROUPED] = partial(baseline_eval.scores_grouped, cell, tuned["baseline"])
    clock.alternate(
        "evaluation",
        repetition,
        {name: partial(work.both, cell, tuned[name]) for name, work in both.items()},
    )
    replying = [
        {name: partial(work.replies, cell, models[name]) for name, work in both.items()}
        for models in (tuned, base)
    ]
    return Round(
        training,
        clock.alternate("scores", repetition, scoring),
        clock.alternate("replies", repetition, replying[0]),
        clock.alternate("replies of the base", repetition, replying[1]),
    )


def tokens(cell: Cell) -> dict[str, float]:
    """Numbers of useful tokens: of the training rows over all epochs, and of the test prompts."""
    train, test = cell.rendered()
    passes = cell.experiment.train.epochs
    return {
        "train": sum(len(item.ids) for item in train) * passes,
        "train, supervised": sum(len(item.answer_ids) for item in train) * passes,
        "test prompts": sum(item.num_prompt for item in test),
        "mean row": round(sum(len(item.ids) for item in train) / len(train), 1),
    }
