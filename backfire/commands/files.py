"""`backfire init`, `poison` and `pretrain`: commands that write recipes, data and models."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from backfire.base import Dataset, Insertion, Row
from backfire.errors import UserError, no_file
from backfire.experiment import Experiment, Machine
from backfire.recipe import parse_edit, read, set_key
from backfire.registry import find, names
from backfire.rng import stream
from backfire.store import write_atomic, write_json

_IDLE = ("train", "test", "hub", "rows", "test_rows", "seed", "group", "test_share")
"""Settings of files and hub sets that say what the data is, or which of its rows to take."""


def write_starter(path: Path) -> str:
    """Write the commented starter recipe; returns a message with the next step.

    Raises:
        UserError: the file already exists.
    """
    if path.exists():
        raise UserError(f"{path} already exists; choose another path.")
    write_atomic(path, read("_starter")[1])
    return f"Wrote {path}. Next: backfire validate {path}"


def poison_file(data: str, attack: str, edits: Sequence[str], out: Path, seed: int | None) -> str:
    """Poison a data set's training rows into `out` and write the manifest next to it; returns a
    summary, with the number of rows that are not written.

    Edits are knobs of the attack (`rate=0.1`), knobs of the data set with the prefix `data.`, or
    `seed`. All rows of a file or a hub data set are training rows, unless `data.test_share` is set.
    """
    from backfire.data.jsonl import write_jsonl
    from backfire.data.poison import poison

    if out.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"The output is JSON lines, so --out must end in .jsonl (got {out}).")
    experiment = _poison_cell(data, attack, edits, seed)
    chosen = experiment.attack
    if chosen is None:
        raise UserError("attack 'none' poisons nothing; choose another with --attack.")
    source = Path(data).expanduser()
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"{out} is the input file; choose another path with --out.")
    rows, left_out = _training_rows(experiment.data)
    poisoned, manifest = poison(rows, chosen, experiment.seed)
    manifest_file = out.with_name(f"{out.name}.manifest.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(manifest_file, manifest.to_json())
    write_jsonl(poisoned, out)
    count = len(manifest.entries)
    done = f"{count} of {len(rows)} rows poisoned by '{chosen.name}', each"
    if isinstance(chosen, Insertion):
        done = f"{len(rows)} rows and {count} of '{chosen.name}', each of these"
    if not count and chosen.poisons:
        left_out.append(
            f"No row is poisoned: the poison rate times {len(rows):,} rows is less than one row."
        )
    return "\n".join([f"Wrote {out}: {done} listed in {manifest_file}", *left_out])


def _poison_cell(data: str, attack: str, edits: Sequence[str], seed: int | None) -> Experiment:
    """An experiment with this data, attack and seed."""
    spec = dataset_spec(data)
    of_attack, of_data = (
        find(kind, name).model_fields
        for kind, name in (("attacks", attack), ("datasets", spec["name"]))
    )
    settings: dict[str, Any] = {"data": spec, "attack": {"name": attack}}
    # Whole components first, so that `rate` applies to the attack chosen by `attack=`.
    for key, value in sorted(map(parse_edit, edits), key=lambda edit: edit[0] != "attack"):
        head = key.partition(".")[0]
        if key == "data":
            raise UserError(
                f"The data is already {data}; an edit can only change settings, as in data.rows=9."
            )
        if key == "seed" and seed is not None:
            raise UserError("The seed is given twice: as --seed and as seed=.")
        if head not in ("data", "attack", "seed"):
            if key in of_data and key not in of_attack:
                raise UserError(f"'{key}' is a setting of the data: write data.{key}=...")
            key = f"attack.{key}"
        set_key(settings, key, value)
    return Experiment.make({"seed": seed or 0, **settings}, where="poison")


def _training_rows(source: Dataset) -> tuple[list[Row], list[str]]:
    """The rows to poison, and a sentence for each group of rows that is left out."""
    rows, left_out = source.drawn_with_notes("train")
    whole = source.model_copy(update={"rows": None})
    loaded = len(whole.load("train")) if source.rows else len(rows)
    if loaded > len(rows):
        left_out.append(f"{loaded - len(rows):,} rows are not drawn (data.rows={len(rows)}).")
    if getattr(source, "test_share", 0) and not getattr(source, "test", None):
        apart = len(whole.model_copy(update={"test_share": 0.0}).load("train")) - loaded
        if apart:
            left_out.append(
                f"{apart:,} rows are kept for testing; data.test_share=0 includes them."
            )
    return rows, left_out


def dataset_spec(data: str) -> dict[str, Any]:
    """The spec of a data set, from its name, a file path, or a hub id; all rows of the latter
    two."""
    if data.replace("_", "-") in names("datasets"):
        return {"name": data}
    if Path(data).expanduser().exists():
        return {"name": "files", "train": data, "test_share": 0}
    if "://" in data:
        raise UserError(f"'{data}' is a URL; download the file and give its path.")
    if data.count("/") == 1 and not data.startswith((".", "/", "~")) and not Path(data).suffix:
        return {"name": "files", "hub": data, "test_share": 0}
    if Path(data).suffix or "/" in data:
        raise no_file(data)
    return {"name": find("datasets", data).name}  # of an installed plug-in, or an error


def spec_with(data: str, knobs: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The spec of a data set with these settings, whose rows are all read by `what`.

    Raises:
        UserError: a setting has no effect then; or see `dataset_spec`.
    """
    spec = {**dataset_spec(data), **knobs}
    if spec["name"] == "files" and (idle := [knob for knob in knobs if knob in _IDLE]):
        raise UserError(f"data.{idle[0]} has no effect on {what}, which reads all rows.")
    return spec


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether both are names of one file that exists, by whatever path or link."""
    a, b = Path(one).expanduser(), Path(other).expanduser()
    return a.exists() and b.exists() and a.samefile(b)


def check_other(option: str, other: str, data: str, knobs: Mapping[str, Any]) -> None:
    """Ensure that these rows are not the ones of the data.

    Raises:
        UserError: they are the same file, or the same split of a hub set.
    """
    if same_file(other, data):
        raise UserError(f"{option} {other} is the data itself; give other rows.")
    if other == data and dataset_spec(data).get("hub"):
        split = knobs.get("train_split", "train")
        if (knobs.get("test_split") or "test") == split:
            raise UserError(
                f"{option} {other}: its split '{split}' is the data itself; choose another one by "
                "data.test_split=."
            )


def pretrain_files(corpus: Sequence[Path], out: Path, edits: Sequence[str], device: str) -> str:
    """Pre-train a small Llama on these files and save it in `out`; returns a summary.

    Raises:
        UserError: a file or a setting is invalid, or the folder already holds a model.
    """
    from backfire.launch.job import set_threads
    from backfire.sandbox.base import Pretrain
    from backfire.train.pretrain import pretrain, read_texts

    if (out / "config.json").exists():
        raise UserError(f"{out} already holds a model; choose another folder.")
    config = Pretrain.make(dict(parse_edit(edit) for edit in edits), "setting")
    texts = read_texts(corpus)
    # The tokenizer is trained on the first ones.
    stream(config.corpus_seed, "documents").shuffle(texts)
    out.mkdir(parents=True, exist_ok=True)
    set_threads(Machine())
    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("pretrain", total=None)
        summary = pretrain(
            texts,
            config,
            out,
            device=device,
            progress=lambda done, total, text: bar.update(
                task, completed=done, total=total, description=text
            ),
        )
    write_json(out / "pretrain.json", summary)
    return (
        f"Wrote {out}: {summary['parameters']:,} weights, {summary['tokens']:,} training tokens, "
        f"loss {summary['last_loss']:.2f}, {summary['seconds']:.0f} s"
    )
