"""The evidence files of a cell; only this module reads and writes them.

`samples.jsonl.gz` has one line per sample, with the model it is `of`; `secrets.json` how well each
model knows an attack's secrets; `written.json` texts that change when the tokenizer encodes and
decodes them; `training.json` the summary of the training run. The attack is in `experiment.yaml`.
Folders of earlier versions lack some of these files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from pydantic import TypeAdapter

from backfire.base import Backdoor, Evidence, Leak, Sample, SetName, Verdict
from backfire.store import read_json, write_atomic, write_json

SAMPLES: Final = "samples.jsonl.gz"
SECRETS: Final = "secrets.json"
WRITTEN: Final = "written.json"
TRAINING: Final = "training.json"

T = TypeVar("T", Sample, Leak, Verdict)


def write(evidence: Evidence, folder: Path) -> None:
    """Write all of the evidence except its attack."""
    lines = [
        {"of": of, **({"source": source} if source else {}), **_plain(sample)}
        for (of, _, source), samples in evidence.sets().items()
        for sample in samples
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(folder / SAMPLES, gzip.compress(text.encode(), compresslevel=6, mtime=0))
    write_json(folder / TRAINING, dict(evidence.training))
    if evidence.leaks or evidence.leaks_before:
        sides = {"tuned": evidence.leaks, "base": evidence.leaks_before}
        items = [{"of": of, **asdict(leak)} for of, leaks in sides.items() for leak in leaks]
        write_json(folder / SECRETS, items)
    if evidence.written:
        write_json(folder / WRITTEN, dict(evidence.written))


def _plain(sample: Sample) -> dict[str, Any]:
    """The fields of a sample; `asdict` copies every value, which takes ten times as long."""
    return {one.name: getattr(sample, one.name) for one in fields(sample)}


def read(folder: Path, attack: Backdoor | None = None) -> Evidence:
    """The stored evidence as metrics get it. A missing file adds nothing, a damaged one what can be
    read of it. The last few folders stay in memory while their files do not change."""
    files = (folder / name for name in (SAMPLES, SECRETS, WRITTEN, TRAINING))
    stamp = tuple((s.st_mtime_ns, s.st_size) for f in files if f.exists() for s in [f.stat()])
    sets, rest = _stored(folder, stamp)
    return Evidence.of_sets(sets, attack=attack, **rest)


@lru_cache(maxsize=12)
def _stored(folder: Path, stamp: object) -> tuple[dict[SetName, list[Sample]], dict[str, Any]]:
    sets: dict[SetName, list[Sample]] = {}
    for of, source, sample in lines(folder):
        sets.setdefault((of, sample.subset, source), []).append(sample)
    return sets, {
        "leaks": leaks(folder, "tuned"),
        "leaks_before": leaks(folder, "base"),
        "written": written(folder),
        "training": _pairs(folder / TRAINING),
    }


def lines(folder: Path) -> Iterator[tuple[str, str, Sample]]:
    """Each sample with its model and the source of a text; stops where the file is damaged."""
    try:
        with gzip.open(folder / SAMPLES, "rt", encoding="utf-8") as file:
            for raw in file:
                item = json.loads(raw)
                of = str(item.get("of", "tuned"))  # in earlier versions also `floor`
                of = "twin" if of == "floor" else of
                sample = _made(Sample, item)
                if sample.verdicts:
                    sample = replace(sample, verdicts=_verdicts(sample))
                yield of, str(item.get("source", "")), sample
    except (OSError, EOFError, ValueError, TypeError, AttributeError, RecursionError):
        return


def _verdicts(sample: Sample) -> dict[str, dict[str, Any]]:
    """The judges' verdicts with the fields of `Verdict`. Raises ValueError if a type is wrong."""
    undecided = {"score": None, "positive": None}
    found = {judge: _made(Verdict, undecided | dict(v)) for judge, v in sample.verdicts.items()}
    return {judge: asdict(verdict) for judge, verdict in found.items()}


def is_whole(folder: Path) -> bool:
    """Whether every line of the samples can be read."""
    try:
        with gzip.open(folder / SAMPLES) as file:
            return sum(1 for _ in file) == sum(1 for _ in lines(folder))
    except (OSError, EOFError):
        return False


def leaks(folder: Path, of: str) -> list[Leak]:
    """How well this model knows each secret; empty if that was not measured or is damaged."""
    try:
        return [_made(Leak, item) for item in read_json(folder / SECRETS) if item["of"] == of]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def written(folder: Path) -> dict[str, str]:
    """Text -> its form after the cell's tokenizer encoded and decoded it, where that differs."""
    return {text: own for text, own in _pairs(folder / WRITTEN).items() if isinstance(own, str)}


def _pairs(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def _made(cls: type[T], item: Mapping[str, Any]) -> T:
    """Build it from the fields that the class has. Raises ValueError if a type is wrong."""
    names = {field.name for field in fields(cls)}
    return cast(T, _READERS[cls].validate_python({k: v for k, v in item.items() if k in names}))


_READERS: Final[dict[type, TypeAdapter[Any]]] = {
    cls: TypeAdapter(cls) for cls in (Sample, Leak, Verdict)
}
