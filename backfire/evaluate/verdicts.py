"""Verdicts of a judge on many exchanges, cached on disk.

Equal exchanges share one verdict, and earlier verdicts, of this run or another, are read from the
cache. Its key covers the judge's identity and every field that the judge reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from backfire import stages
from backfire.base import Exchange, Judge, Verdict
from backfire.data.recipe_files import refuse_unread
from backfire.evaluate import journal
from backfire.locks import locked
from backfire.progress import Pace, Progress, silent
from backfire.store import digest


def judged(
    judge: Judge,
    exchanges: Sequence[Exchange],
    folder: Path,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[Verdict]:
    """One verdict for each exchange, in order; only those not cached in `folder` are computed.

    Each batch is on disk before the next begins, so an interruption costs one batch.

    Raises:
        UserError: a text of the judge was not read from its file.
    """
    refuse_unread(*vars(judge).values())
    stage = stages.judged(judge)
    file = folder / f"{stage.slug}-{stage.key}.jsonl"
    verdicts = _read(file)
    keys = [_key(judge, exchange) for exchange in exchanges]
    missing = {
        key: exchange for key, exchange in zip(keys, exchanges, strict=True) if key not in verdicts
    }
    todo, pace = list(missing.items()), Pace()
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        progress(start, len(todo), pace.text(f"judge {judge.name}", start))
        judgments = judge.judge([exchange for _, exchange in batch])
        fresh = {key: verdict for (key, _), verdict in zip(batch, judgments, strict=True)}
        _append(file, fresh)
        verdicts.update(fresh)
    return [verdicts[key] for key in keys]


def _key(judge: Judge, exchange: Exchange) -> str:
    read = {name: exchange.fields.get(name) for name in judge.reads}
    return digest([exchange.prompt, exchange.reply, read], length=32)


def _append(file: Path, verdicts: Mapping[str, Verdict]) -> None:
    """Append verdicts; other processes may append at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file, across_hosts=True):
        journal.append(file, ({"key": key, **asdict(one)} for key, one in verdicts.items()))


def _read(file: Path) -> dict[str, Verdict]:
    """The verdicts in a cache file."""
    verdicts: dict[str, Verdict] = {}
    for entry in journal.entries(file):
        try:
            key = entry.pop("key")
            verdicts[key] = Verdict(**entry)
        except (LookupError, TypeError):
            continue
    return verdicts
