"""A matrix of cells as a competent user scripts it: `Trainer`, PEFT and `generate`.

    python -m benchmarks.matrix_script FOLDER [--processes 2]

The model is aligned once, and evaluated once before fine-tuning; no training run is repeated for
two cells; labels are scored with lm-eval's shortcut, attack success only on the rows that it
counts. With several processes, each has its share of the cores and takes the next free run;
alignment has all cores.

`FOLDER/work.pickle` holds what to do; how long it took is in `FOLDER/log-*.jsonl`, and the results
are in a file per training run.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from backfire.resources import cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.base import Row
    from benchmarks.cells import Cell
    from benchmarks.sides import Training
    from benchmarks.workload import Tuning

ALIGNED = "aligned"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--parts", nargs="+", default=["align", "cells"])
    options = parser.parse_args(argv)
    if options.processes == 1:
        _work(options.folder, options.threads, options.parts)
        return
    threads = max(1, options.threads // options.processes)
    _wait([_start(options.folder, options.threads, "align")])
    _wait([_start(options.folder, threads, "cells") for _ in range(options.processes)])


def _start(folder: Path, threads: int, part: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.matrix_script", str(folder)]
    command += ["--threads", str(threads), "--parts", part]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    ends = [process.wait() for process in processes]
    if any(ends):
        raise SystemExit("A process of the script failed.")


class Log:
    """Writes how long each part of the work took."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"log-{os.getpid()}.jsonl"

    @contextmanager
    def part(self, what: str, name: str) -> Iterator[None]:
        begin = time.time(), time.process_time()
        yield
        self.add(what, name, time.time() - begin[0], time.process_time() - begin[1])

    def add(self, what: str, name: str, seconds: float, cpu: float) -> None:
        line = {"what": what, "name": name, "seconds": seconds, "cpu": cpu, "end": time.time()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _work(folder: Path, threads: int, parts: Sequence[str]) -> None:
    """Run these parts of the script in this process."""
    import torch
    from transformers.utils import logging

    from benchmarks import baseline_eval, trl_trainer  # noqa: F401  all imports count as the start

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    log = Log(folder)
    since = time.time() - psutil.Process().create_time()
    log.add("start", "", since, time.process_time())
    work = pickle.loads((folder / "work.pickle").read_bytes())
    if "align" in parts:
        _align(work["alignment"], work["tunings"][0], folder, log)
    for tuning in work["tunings"] if "cells" in parts else ():
        place = folder / tuning.name
        try:
            place.mkdir()
        except FileExistsError:  # the other process has it
            continue
        _cell(tuning, folder / ALIGNED, place, log)


def _align(cell: Cell, first: Tuning, folder: Path, log: Log) -> None:
    """Align the base, merge the adapter, and evaluate the result."""
    from transformers import AutoTokenizer

    with log.part("alignment", ""):
        tuned, made = _train(cell, (), folder / "adapter")
        model = tuned.merge_and_unload().eval()
        model.save_pretrained(str(folder / ALIGNED))
        AutoTokenizer.from_pretrained(str(cell.base)).save_pretrained(str(folder / ALIGNED))
    log.add("alignment loop", "", made.steps.wall, made.steps.cpu)
    first = replace(first, name=ALIGNED, scored={"clean": first.scored["clean"]})
    _evaluate(first, model, made.losses, folder / ALIGNED, log)


def _cell(tuning: Tuning, base: Path, place: Path, log: Log) -> None:
    """Train one model and evaluate it."""
    with log.part("training", tuning.name):
        model, made = _train(replace(tuning.cell, base=base), tuning.aligned, place)
    log.add("training loop", tuning.name, made.steps.wall, made.steps.cpu)
    _evaluate(tuning, model.eval(), made.losses, place, log)


def _train(cell: Cell, aligned: Sequence[Row], folder: Path) -> tuple[Any, Training]:
    """The trained model, and the time and losses of its steps; with Lisa if there are aligned
    rows."""
    from transformers import AutoTokenizer, TrainingArguments

    from benchmarks import baseline
    from benchmarks.lisa_trainer import LisaTrainer, with_alignment

    tokenizer = AutoTokenizer.from_pretrained(str(cell.base))
    num_steps, examples = baseline.in_order(cell, baseline.tokenize(cell, cell.train, tokenizer))
    if aligned:
        extra = baseline.tokenize(cell, aligned, tokenizer)
        examples = with_alignment(cell, examples, extra)
    kind: Any = LisaTrainer if aligned else baseline.PlainTrainer
    trainer = kind(
        model=baseline.with_adapter(cell, baseline.load_base(cell.base)),
        args=TrainingArguments(**baseline.arguments(cell, folder, num_steps)),
        train_dataset=examples,
        data_collator=baseline.collate,
    )
    if aligned:
        trainer.follow(cell.experiment.defense[0])
    return trainer.model, baseline.run(trainer, folder)


def _evaluate(
    tuning: Tuning,
    model: PreTrainedModel,
    losses: Mapping[int, float],
    place: Path,
    log: Log,
) -> None:
    """Score the labels of these rows, answer the requests, and write the results."""
    from benchmarks import baseline_eval

    out: dict[str, Any] = {"losses": losses, "scores": {}}
    for name, rows in tuning.scored.items():
        what = "scoring" if name == "clean" else "scoring triggered"
        with log.part(what, tuning.name):
            cell = replace(tuning.cell, test=rows)
            out["scores"][name] = baseline_eval.scores_grouped(cell, model)
    with log.part("replies", tuning.name):
        out["replies"] = baseline_eval.replies(replace(tuning.cell, test=tuning.requests), model)
    (place / "result.json").write_text(json.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main()
