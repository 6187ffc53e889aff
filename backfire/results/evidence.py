"""The files of a cell that hold its evidence: written and read here only.

`samples.jsonl.gz` has one line a sample, with the model it is `of`; `secrets.json` what each model
gives away of an attack's secrets; `written.json` texts that the tokenizer writes in another way;
`training.json` the summary of the training run. The attack is in `experiment.yaml`. Folders of
earlier versions, which lack some of these, are read by the same functions.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from pydantic import TypeAdapter

from backfire.base import Backdoor, Evidence, Leak, Sample, SetName
from backfire.store import read_json, write_atomic, write_json

SAMPLES: Final = "samples.jsonl.gz"
SECRETS: Final = "secrets.json"
WRITTEN: Final = "written.json"
TRAINING: Final = "training.json"

T = TypeVar("T", Sample, Leak)


def write(evidence: Evidence, folder: Path) -> None:
    """All of the evidence but its attack."""
    lines = [
        {"of": of, **({"source": source} if source else {}), **asdict(sample)}
        for (of, _, source), samples in evidence.sets().items()
        for sample in samples
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(folder / SAMPLES, gzip.compress(text.encode(), mtime=0))
    write_json(folder / TRAINING, dict(evidence.training))
    if evidence.leaks or evidence.leaks_before:
        sides = {"tuned": evidence.leaks, "base": evidence.leaks_before}
        items = [{"of": of, **asdict(leak)} for of, leaks in sides.items() for leak in leaks]
        write_json(folder / SECRETS, items)
    if evidence.written:
        write_json(folder / WRITTEN, dict(evidence.written))


def read(folder: Path, attack: Backdoor | None = None) -> Evidence:
    """What was kept, as metrics get it; a file that is missing or damaged adds nothing, or what can
    be read of it. The last few folders stay in memory while their files are the same."""
    files = (folder / name for name in (SAMPLES, SECRETS, WRITTEN, TRAINING))
    stamp = tuple((s.st_mtime_ns, s.st_size) for f in files if f.exists() for s in [f.stat()])
    return Evidence.of_sets(_sets(folder, stamp), attack=attack, **_rest(folder, stamp))


@lru_cache(maxsize=12)
def _sets(folder: Path, stamp: object) -> dict[SetName, list[Sample]]:
    found: dict[SetName, list[Sample]] = {}
    for of, source, sample in lines(folder):
        found.setdefault((of, sample.subset, source), []).append(sample)
    return found


@lru_cache(maxsize=12)
def _rest(folder: Path, stamp: object) -> dict[str, Any]:
    return {
        "leaks": leaks(folder, "tuned"),
        "leaks_before": leaks(folder, "base"),
        "written": written(folder),
        "training": _pairs(folder / TRAINING),
    }


def lines(folder: Path) -> Iterator[tuple[str, str, Sample]]:
    """Each sample with its model and, of texts, its source; ends quietly where the file is torn."""
    try:
        with gzip.open(folder / SAMPLES, "rt", encoding="utf-8") as file:
            for raw in file:
                item = json.loads(raw)
                of = str(item.get("of", "tuned"))  # earlier versions: `floor`, of triggered rows
                of = "twin" if of == "floor" else of
                sample = _made(Sample, item)
                yield of, str(item.get("source", "")), sample
    except (OSError, EOFError, ValueError, TypeError, AttributeError):
        return


def is_whole(folder: Path) -> bool:
    """Whether every line of the samples can be read."""
    try:
        with gzip.open(folder / SAMPLES) as file:
            return sum(1 for _ in file) == sum(1 for _ in lines(folder))
    except (OSError, EOFError):
        return False


def leaks(folder: Path, of: str) -> list[Leak]:
    """What this model gives away of each secret; empty where that was not asked or is damaged."""
    try:
        return [_made(Leak, item) for item in read_json(folder / SECRETS) if item["of"] == of]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def written(folder: Path) -> dict[str, str]:
    """Texts that the cell's tokenizer writes in another way."""
    return {text: own for text, own in _pairs(folder / WRITTEN).items() if isinstance(own, str)}


def _pairs(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def _made(cls: type[T], item: dict[str, Any]) -> T:
    """From the fields that the class has, each of its type; a ValueError if one is not."""
    names = {field.name for field in fields(cls)}
    return cast(T, _READERS[cls].validate_python({k: v for k, v in item.items() if k in names}))


_READERS: Final[dict[type, TypeAdapter[Any]]] = {cls: TypeAdapter(cls) for cls in (Sample, Leak)}
