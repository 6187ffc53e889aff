"""Nodes of the simulation: threads, each with a host name of its own, that work on a run. Workers'
loop, claims, store and the files of a result are the real ones; training and evaluation sleep."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.base import Evidence, Sample
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context, Outcome, head
from backfire.result import Value
from backfire.store import Store, write_json

TRAIN, EVALUATE = "train", "evaluate"


@dataclass(frozen=True)
class Pace:
    """How long things take."""

    train_seconds: float
    cell_seconds: float
    speed: float
    """By how much heartbeats, and the age of a stale claim, are shortened."""


class Log:
    """One line for each thing that a node does; written at once, since nodes are killed."""

    def __init__(self, folder: Path, node: int) -> None:
        folder.mkdir(exist_ok=True)
        self.file = (folder / f"{node}.jsonl").open("a", buffering=1, encoding="utf-8")

    def add(self, what: str, **fields: Any) -> None:
        used = resource.getrusage(resource.RUSAGE_THREAD)
        cpu = round(used.ru_utime + used.ru_stime, 3)
        line = {"what": what, "at": time.time(), "cpu": cpu, **fields}
        self.file.write(json.dumps(line) + "\n")


_here = threading.local()
"""The name and the log of the node whose thread this is."""


def run_nodes(numbers: Sequence[int], run: Path, cache: Path, pace: Pace, plan: Any) -> None:
    """Let these nodes, a thread each, work on a plan until nothing is left."""
    from backfire import claims
    from backfire.launch import job

    _be_hosts(claims, pace)
    _sleep_instead(job, pace)
    nodes = [
        threading.Thread(target=_run_node, args=(number, run, cache, plan)) for number in numbers
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()


def _run_node(number: int, run: Path, cache: Path, plan: Any) -> None:
    from backfire.launch import job, work

    _here.name, _here.log = f"node{number:03d}", (log := Log(run.parent / "log", number))
    log.add("start")
    place, store = job.RunFolder(run, plan.recipe), Store(cache)
    machine = Machine(device="cpu", workers=1, threads=1, join="off")

    def watch(one: Any, text: str, done: int, total: int) -> None:
        pass

    def logged(one: Any, *rest: Any) -> str:
        log.add("begin", job=one.id)
        kind = job.run_job(one, *rest)
        log.add("end", job=one.id, kind=kind)
        return kind

    work.work(plan.jobs, place, store, machine, watch, run=logged)
    log.add("over")


def _be_hosts(claims: Any, pace: Pace) -> None:
    """Each a host of its own, so that a dead worker is found by its silence alone."""
    claims.socket.gethostname = lambda: _here.name
    claims.place = lambda: _here.name
    claims.BEAT, claims.STALE = claims.BEAT / pace.speed, claims.STALE / pace.speed


def _sleep_instead(job: Any, pace: Pace) -> None:
    """Replace what takes a model by sleeps and files of the usual names."""

    def base(model: Any, context: Context) -> None:
        context.progress(1, 1, "base")

    def trained(experiment: Experiment, context: Context) -> Path:
        if not experiment.poisons:
            experiment = experiment.clean_twin()

        def make(folder: Path) -> None:
            _here.log.add(TRAIN, key=stages.keys(experiment).train)
            _sleep(pace.train_seconds, context)
            for name in ("adapter_model.safetensors", "adapter_config.json", "train.jsonl"):
                (folder / name).write_bytes(b"x" * 1000)
            write_json(folder / "summary.json", {"steps": 1})

        return context.store.once(stages.train(experiment), make, resumable=True)

    def run_cell(experiment: Experiment, context: Context) -> Outcome:
        trained(experiment, context)
        key = stages.cell_key(experiment)
        _here.log.add(EVALUATE, key=key)
        _sleep(pace.cell_seconds, context)
        samples = [Sample(id=str(n), subset="clean", prompt="p", answer="a") for n in range(8)]
        number = int(key, 16) % 1000 / 1000  # a function of the cell, so that repeats would agree
        value = Value("accuracy", number, number, number, 8, "higher")
        result = replace(head(experiment, key), status="ok", values=(value,))
        return Outcome(result, Evidence(clean=samples), None)

    job.base, job.trained, job.run_cell = base, trained, run_cell


def _sleep(seconds: float, context: Context) -> None:
    """Sleep, with progress as often as training reports it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.5, left))
        context.progress(int(100 * (1 - max(0, left) / seconds)), 100, "loss 1.0")
