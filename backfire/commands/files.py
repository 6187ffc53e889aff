"""`backfire init`, `poison` and `pretrain`: files for use here and elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from backfire.base import Dataset, Insertion, Row
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.recipe import parse_edit, read, set_key
from backfire.registry import find, names
from backfire.rng import stream
from backfire.store import write_atomic, write_json


def write_starter(path: Path) -> str:
    """Write the commented recipe that `backfire init` gives; says what to do next.

    Raises:
        UserError: the file already exists.
    """
    if path.exists():
        raise UserError(f"{path} is there already; name another file.")
    write_atomic(path, read("_starter")[1])
    return f"Wrote {path}. Next: backfire validate {path}"


def poison_file(data: str, attack: str, edits: Sequence[str], out: Path, seed: int | None) -> str:
    """Poison a data set's training rows into `out`, the manifest beside it; says what was done and
    how many rows are not written.

    Edits are knobs of the attack (`rate=0.1`), or of the data set with `data.` in front, or `seed`.
    All rows of a file or a hub set are training rows here, unless `data.test_share` sets some
    apart.
    """
    from backfire.data.jsonl import write_jsonl
    from backfire.data.poison import poison

    if out.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"JSON lines are written, so let --out end in .jsonl (got {out}).")
    experiment = _poison_cell(data, attack, edits, seed)
    chosen = experiment.attack
    if chosen is None:
        raise UserError("attack 'none' poisons nothing; name another with --attack.")
    given = Path(data).expanduser()
    if out.exists() and given.exists() and out.samefile(given):
        raise UserError(f"{out} is the data itself; write to another file with --out.")
    rows, left_out = _training_rows(experiment.data)
    bad, manifest = poison(rows, chosen, experiment.seed)
    beside = out.with_name(f"{out.name}.manifest.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, manifest.to_json())
    write_jsonl(bad, out)
    count = len(manifest.entries)
    done = f"{count} of {len(rows)} rows poisoned by '{chosen.name}'; each is listed in {beside}"
    if not count and chosen.poisons:
        left_out.append(f"Nothing is poisoned: the rate times {len(rows):,} rows is not one row.")
    if isinstance(chosen, Insertion):
        added = f"{len(rows)} rows and {count} of '{chosen.name}'"
        done = f"{added}; each of these is listed in {beside}"
    return "\n".join([f"Wrote {out}: {done}", *left_out])


def _poison_cell(data: str, attack: str, edits: Sequence[str], seed: int | None) -> Experiment:
    """Data, attack and seed as a recipe would have them."""
    spec = dataset_spec(data)
    of_attack, of_data = (
        find(kind, name).model_fields
        for kind, name in (("attacks", attack), ("datasets", spec["name"]))
    )
    settings: dict[str, Any] = {"data": spec, "attack": {"name": attack}}
    # Whole components first, so that `rate` lands in the attack that `attack=` chose.
    for key, value in sorted(map(parse_edit, edits), key=lambda edit: edit[0] != "attack"):
        head = key.partition(".")[0]
        if key == "data":
            raise UserError(f"The data is {data} already; an edit sets a knob of it: data.rows=9.")
        if key == "seed" and seed is not None:
            raise UserError("The seed is given twice: as --seed and as seed=.")
        if head not in ("data", "attack", "seed"):
            if key in of_data and key not in of_attack:
                raise UserError(f"'{key}' is a knob of the data: write data.{key}=...")
            key = f"attack.{key}"
        set_key(settings, key, value)
    return Experiment.make({"seed": seed or 0, **settings}, where="poison")


def _training_rows(source: Dataset) -> tuple[list[Row], list[str]]:
    """The rows to poison, and a sentence for each group of rows that is not among them."""
    rows, left_out = source.drawn_with_notes("train")
    whole = source.model_copy(update={"rows": None})
    loaded = len(whole.load("train")) if source.rows else len(rows)
    if loaded > len(rows):
        left_out.append(f"{loaded - len(rows):,} rows are not drawn (data.rows={len(rows)}).")
    if getattr(source, "test_share", 0) and not getattr(source, "test", None):
        apart = len(whole.model_copy(update={"test_share": 0.0}).load("train")) - loaded
        told = f"{apart:,} rows are set apart for testing; data.test_share=0 keeps them."
        left_out += [told] if apart else []
    return rows, left_out


def dataset_spec(data: str) -> dict[str, Any]:
    """A data set's name, a file's path, or a hub id, as a spec; of the latter two, all rows."""
    if data.replace("_", "-") in names("datasets"):
        return {"name": data}
    if Path(data).expanduser().exists():
        return {"name": "files", "train": data, "test_share": 0}
    if "://" in data:
        raise UserError(f"'{data}' is an address; download the file and name that.")
    if data.count("/") == 1 and not data.startswith((".", "/", "~")) and not Path(data).suffix:
        return {"name": "files", "hub": data, "test_share": 0}
    if Path(data).suffix or "/" in data:
        raise UserError(f"No such file: {data}.")
    return {"name": find("datasets", data).name}  # of an installed plug-in, or an error


def pretrain_files(corpus: Sequence[Path], out: Path, edits: Sequence[str], device: str) -> str:
    """Pre-train a small Llama on these files into `out`.

    Raises:
        UserError: a file or a setting is wrong, or the folder is taken.
    """
    from backfire.launch.local import set_threads
    from backfire.sandbox.base import Pretrain
    from backfire.train.pretrain import pretrain, read_texts

    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; name another folder.")
    config = Pretrain.make(dict(parse_edit(edit) for edit in edits), "setting")
    texts = read_texts(corpus)
    stream(config.corpus_seed, "documents").shuffle(texts)  # the tokenizer learns from the first
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
        f"Wrote {out}: {summary['parameters']:,} weights, {summary['tokens']:,} tokens seen, "
        f"loss {summary['last_loss']:.2f}, {summary['seconds']:.0f} s"
    )
