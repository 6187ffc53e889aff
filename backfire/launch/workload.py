"""How much there is to train: rows, tokens, time and disk of a recipe. Estimates; no torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from backfire import plan
from backfire.base import Row
from backfire.data.render import Renderer
from backfire.data.rows import read_jsonl
from backfire.data.tokenizer import load_tokenizer
from backfire.data.weights import read_config
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Model
from backfire.model.count import num_weights, weights_in
from backfire.store import Store

_SAMPLE = 200  # rows whose tokens are counted


@dataclass(frozen=True)
class Weights:
    """How many weights the base has, a method adds, and of all of them are trained."""

    parameters: int
    added: int
    trainable: int


@dataclass(frozen=True)
class Rows:
    """How many training rows, and tokens in a row: mean, longest, and in the longest answer."""

    count: int
    tokens: float
    longest: int
    answer: int


def pair(cell: Experiment) -> str:
    """The same for cells with the same model and method, whatever the learning rate."""
    knobs = {k: v for k, v in cell.method.spec().items() if k != "learning_rate"}
    return str([cell.model.spec(), knobs])


def shown(cell: Experiment) -> str:
    """The same for cells whose rows are the same, and rendered alike."""
    return str([cell.model.spec(), cell.data.spec(), cell.template.spec(), cell.train.seen])


def lengths(cells: Iterable[Experiment], store: Store) -> dict[str, Rows | None]:
    """`rows_of` of all cells, each counted once."""
    found: dict[str, Rows | None] = {}
    for cell in cells:
        if shown(cell) not in found:
            found[shown(cell)] = rows_of(cell, store)
    return found


def model_folder(model: Model, store: Store) -> Path | None:
    """Where the model's config.json or tokenizer is on this machine, if anywhere; nothing is
    fetched, and the embedded model is not made for it."""
    if model.name == "sandbox":
        from backfire.model.source import sandbox_key

        folder = store.path("tokenizer", "sandbox", sandbox_key())
        return folder if folder.is_dir() else None
    if model.is_folder:
        return Path(model.name).expanduser()
    from backfire.model.source import downloaded

    return downloaded(model)


def roughly(cell: Experiment, folder: Path | None) -> Weights | None:
    """From the headers of the weights' files; an adapter's from its rank alone."""
    if cell.model.name == "sandbox":
        from backfire.sandbox.base import Pretrain

        width, count = Pretrain().hidden_size, num_weights(cell.model)
    else:
        try:
            config = read_config(folder / "config.json") if folder else {}
            width = (config.get("text_config") or config).get("hidden_size", 0)
        except UserError:
            return None
        count = weights_in(folder) if folder else None
    if not count or not width:
        return None
    if cell.method.name == "full":
        return Weights(count, 0, count)
    added = min(count, round(count * 2 * getattr(cell.method, "rank", 1) / width))
    return Weights(count, added, added)


def rows_of(cell: Experiment, store: Store) -> Rows | None:
    """Of a sample, tokens are counted; None if the rows are not on this machine."""
    data, name = cell.data, plan.data_slug(cell.data)
    if store.done("data", name, cell.keys.data):
        rows = read_jsonl(store.path("data", name, cell.keys.data) / "train.jsonl")
    elif getattr(data, "hub", None) and not getattr(data, "train", None):
        return None
    else:
        rows = data.drawn("train")
    sample = rows[:: math.ceil(len(rows) / _SAMPLE)]
    folder, longest = model_folder(cell.model, store), cell.train.max_length
    if folder and any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")):
        try:
            items, _ = Renderer(
                cell.template, load_tokenizer(folder), longest, on_long_row=cell.train.on_long_row
            ).sift(sample)
        except CellError:  # a row that does not fit at all: `validate` says which
            return Rows(len(rows), longest, longest, longest)
        lengths = [(len(item.ids), len(item.answer_ids)) for item in items]
    else:
        lengths = [_without_tokenizer(cell, row) for row in sample]
    whole = [min(length, longest) for length, _ in lengths]
    return Rows(len(rows), sum(whole) / len(whole), max(whole), max(a for _, a in lengths))


def _without_tokenizer(cell: Experiment, row: Row) -> tuple[int, int]:
    """Tokens of the row and of its answer, four characters a token."""
    try:
        prompt = cell.template.prompt(row)
    except NotImplementedError:  # the tokenizer's own template
        prompt = "".join(message.content for message in row.messages)
    answer = 1 + math.ceil(len(row.answer) / 4)
    return 1 + len(prompt) // 4 + answer, answer


def tokens_of(run: Experiment, rows: Rows) -> float:
    """Tokens that a training run sees."""
    if run.train.max_steps:
        return run.train.max_steps * run.train.batch_size * rows.tokens
    return run.train.epochs * rows.count * rows.tokens
