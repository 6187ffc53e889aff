"""The training of a cell with TRL's `SFTTrainer`, with its fastest settings for the same work.

The loss computes no prompt logits (TRL's default), and gradient checkpointing, which TRL turns on,
is off. Rows are padded: `padding_free` flattens a batch into one sequence, for which attention on
a CPU computes a mask over all pairs of its tokens, and was slower than `Trainer` by a seventh.
Packing several rows into one is off: it would change the rows of a step, so it is another
experiment.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from datasets import Dataset as Table
from transformers import AutoTokenizer

from benchmarks import baseline
from benchmarks.cells import Cell
from benchmarks.sides import Training


def installed() -> bool:
    return importlib.util.find_spec("trl") is not None


def train(cell: Cell, folder: Path) -> Training:
    """Train on the cell's rows and save the model in `folder`."""
    from trl import SFTConfig, SFTTrainer

    class Recorded(baseline.Recorder, SFTTrainer):  # type: ignore[misc]
        pass

    tokenizer = AutoTokenizer.from_pretrained(str(cell.base))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples = baseline.tokenize(cell, cell.train, tokenizer)
    num_steps, ordered = baseline.in_order(cell, examples)
    rows = [
        {"input_ids": e.ids, "labels": [-100] * e.num_prompt + e.ids[e.num_prompt :]}
        for e in ordered
    ]
    trainer = Recorded(
        model=baseline.with_adapter(cell, baseline.load_base(cell.base)),
        args=SFTConfig(
            **baseline.arguments(cell, folder, num_steps),
            gradient_checkpointing=False,
            padding_free=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Table.from_list(rows),
        processing_class=tokenizer,
    )
    return baseline.run(trainer, folder)
