"""Results as `.eval` logs of inspect_ai, one a cell, for `inspect view`.

A log holds what the tuned model was asked and what it said, on the clean rows, on the triggered
ones, and on the requests of `safety` with the judges' verdicts; and every number of the cell with
its interval. All text in it is data: nothing is rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from backfire.base import Sample
from backfire.errors import UserError
from backfire.exports.common import (
    Outcomes,
    environment,
    export,
    finished_at,
    outcomes,
    owner,
    plain,
    safe,
    shown,
    stderr,
    tuned,
)
from backfire.result import CellResult, Value
from backfire.results.load import finite, identity
from backfire.results.samples import predicted

ABOUT: Final = ("low", "high", "n", "direction", "unit", "role", "part")
KEPT: Final = (
    *("id", "subset", "group", "label", "prediction", "candidates", "logprobs"),
    *("answer_logprob", "answer_tokens", "verdicts"),
)


def to_inspect(run: Path, out: Path) -> list[Path]:
    """Write a log of each finished cell of a run folder, or of one cell folder, to `out`.

    `created` is when the cell finished, the duration what its own evaluation took (what an equal
    cell had measured was only read). The prompt is the row's own text, before the template was put
    around it. What was not kept, such as token counts, is left out.

    Raises:
        UserError: no such folder, no finished cell, samples that can not be read, or no inspect-ai.
    """
    _inspect("log")
    return export(run, out, _write)


def _inspect(part: str) -> Any:
    """A module of inspect_ai, which is not among what backfire always needs."""
    try:
        return import_module(f"inspect_ai.{part}")
    except ImportError:
        needs = "Writing .eval logs needs inspect-ai: pip install 'backfire[inspect]'"
        raise UserError(needs) from None


def _write(item: CellResult, folder: Path) -> list[Path]:
    created = f"{finished_at(item):%Y-%m-%dT%H-%M-%S}-00-00"  # named as inspect names its own
    parts = (safe(str(part)) for part in (item.data, item.slug, item.key))
    file = folder / f"{'_'.join((created, *parts))}.eval"
    _inspect("log").write_eval_log(_log(item), file)
    return [file]


def _log(item: CellResult) -> Any:
    """inspect's EvalLog."""
    log, found, made_with, known = (
        _inspect("log"),
        tuned(item),
        environment(item),
        plain(identity(item)),
    )
    hits, model = outcomes(item, found), f"backfire/{known['cell']}"
    rows = [_sample(row, hits, model) for row in shown(found)]
    packages = {name: made_with.get(name) for name in ("backfire", "torch", "transformers")}
    ids = [row.id for row in rows]
    spec = log.EvalSpec(
        created=finished_at(item).isoformat(),
        task=known["data"],
        **dict.fromkeys(("eval_id", "run_id", "task_id"), known["key"]),
        task_args=plain(item.settings),
        dataset=log.EvalDataset(name=known["data"], samples=len(rows), sample_ids=ids),
        model=model,
        config=log.EvalConfig(),
        packages={name: version for name, version in packages.items() if version},
        metadata={**known, "warnings": plain(item.warnings), "environment": plain(made_with)},
    )
    results, stats = _results(item.values, hits, len(rows)), log.EvalStats()
    if (seconds := finite(item.evaluate.get("seconds"))) is not None:
        begin = finished_at(item) - timedelta(seconds=seconds)
        stats = log.EvalStats(started_at=begin.isoformat(), completed_at=spec.created)
    return log.EvalLog(status="success", eval=spec, results=results, stats=stats, samples=rows)


def _sample(sample: Sample, hits: Outcomes, model: str) -> Any:
    """inspect's EvalSample."""
    chat, known = _inspect("model"), plain(asdict(sample))
    said, reply = plain(predicted(sample)), known["reply"]
    # The id becomes a file name within the log: whatever is odd in it is percent-encoded.
    id = f"{known['subset']}-{quote(known['id'], safe='')}"
    messages = [chat.ChatMessageUser(content=known["prompt"], id=f"{id}-prompt")]
    output = chat.ModelOutput(model=model)
    if reply is not None:
        # Whether the model ended it or it was cut was not kept.
        output = chat.ModelOutput.from_content(model, reply, stop_reason="unknown")
        output.message.id = f"{id}-reply"
        messages.append(output.message)
    # Where there are both, a label and a reply, it is the metric's knobs that say which counts.
    answer = said if reply is None else reply if said is None else None
    about = {**known, "prediction": said}
    return _inspect("log").EvalSample(
        id=id,
        epoch=1,
        input=known["prompt"],
        choices=known["candidates"] or None,
        target=known["answer"] if known["label"] is None else known["label"],
        messages=messages,
        output=output,
        scores={
            metric: _inspect("scorer").Score(value=hit, answer=answer)
            for metric, hit in hits[sample.subset, sample.id].items()
        },
        metadata={key: about[key] for key in KEPT if about[key] not in (None, {})},
    )


def _results(values: Sequence[Value], hits: Outcomes, rows: int) -> Any:
    """inspect's EvalResults: a scorer for each metric, with the metric's parts and companions."""
    log = _inspect("log")
    scorers: dict[str, dict[str, Any]] = {}
    for value in values:
        if value.value is None:
            continue
        name, metrics = plain(value.metric), scorers.setdefault(owner(value)[0], {})
        about = {key: getattr(value, key) for key in ABOUT}
        metrics[name] = log.EvalMetric(name=name, value=value.value, metadata=plain(about))
        if value.role == "headline" and not value.part and (error := stderr(value)) is not None:
            metrics["stderr"] = log.EvalMetric(name="stderr", value=error)
    counts = Counter(metric for scores in hits.values() for metric in scores)
    scores = [
        log.EvalScore(
            name=scorer,
            scorer=scorer,
            metrics=metrics,
            scored_samples=counts[scorer] or None,
            unscored_samples=rows - counts[scorer] if counts[scorer] else None,
        )
        for scorer, metrics in scorers.items()
    ]
    return log.EvalResults(total_samples=rows, completed_samples=rows, scores=scores)
