"""Results as `.eval` logs of inspect_ai, one per cell, for `inspect view`.

A log holds the tuned model's prompts and answers on clean rows, on triggered rows, and on the
requests of `safety` with the judges' verdicts; and every number of the cell with its interval.
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

    `created` is the time the cell finished, the duration that of its own evaluation (without what
    was read from the cache). The prompt is the row's own text, without the template. What is not
    stored, such as token counts, is left out.

    Raises:
        UserError: no such folder, no finished cell, unreadable samples, or no inspect-ai.
    """
    _inspect("log")
    return export(run, out, _write)


def _inspect(part: str) -> Any:
    """A module of inspect_ai, an optional dependency."""
    try:
        return import_module(f"inspect_ai.{part}")
    except ImportError:
        needs = "Writing .eval logs needs inspect-ai: pip install 'backfire[inspect]'"
        raise UserError(needs) from None


def _write(item: CellResult, folder: Path) -> list[Path]:
    created = f"{finished_at(item):%Y-%m-%dT%H-%M-%S}-00-00"  # as inspect names its logs
    parts = (safe(str(part)) for part in (item.data, item.slug, item.key))
    file = folder / f"{'_'.join((created, *parts))}.eval"
    _inspect("log").write_eval_log(_log(item), file)
    return [file]


def _log(item: CellResult) -> Any:
    """inspect's EvalLog."""
    log, evidence, recorded = _inspect("log"), tuned(item), environment(item)
    fields = plain(identity(item))
    hits, model = outcomes(item, evidence), f"backfire/{fields['cell']}"
    rows = [_sample(row, hits, model) for row in shown(evidence)]
    packages = {name: recorded.get(name) for name in ("backfire", "torch", "transformers")}
    ids = [row.id for row in rows]
    spec = log.EvalSpec(
        created=finished_at(item).isoformat(),
        task=fields["data"],
        **dict.fromkeys(("eval_id", "run_id", "task_id"), fields["key"]),
        task_args=plain(item.settings),
        dataset=log.EvalDataset(name=fields["data"], samples=len(rows), sample_ids=ids),
        model=model,
        config=log.EvalConfig(),
        packages={name: version for name, version in packages.items() if version},
        metadata={**fields, "warnings": plain(item.warnings), "environment": plain(recorded)},
    )
    results, stats = _results(item.values, hits, len(rows)), log.EvalStats()
    if (seconds := finite(item.evaluate.get("seconds"))) is not None:
        begin = finished_at(item) - timedelta(seconds=seconds)
        stats = log.EvalStats(started_at=begin.isoformat(), completed_at=spec.created)
    return log.EvalLog(status="success", eval=spec, results=results, stats=stats, samples=rows)


def _sample(sample: Sample, hits: Outcomes, model: str) -> Any:
    """inspect's EvalSample."""
    chat, fields = _inspect("model"), plain(asdict(sample))
    prediction, reply = plain(predicted(sample)), fields["reply"]
    # The id becomes a file name within the log, so it is percent-encoded.
    id = f"{fields['subset']}-{quote(fields['id'], safe='')}"
    messages = [chat.ChatMessageUser(content=fields["prompt"], id=f"{id}-prompt")]
    output = chat.ModelOutput(model=model)
    if reply is not None:
        # The stored sample does not say why the reply ended.
        output = chat.ModelOutput.from_content(model, reply, stop_reason="unknown")
        output.message.id = f"{id}-reply"
        messages.append(output.message)
    # With both a label and a reply, the metric's knobs decide which one counts.
    answer = prediction if reply is None else reply if prediction is None else None
    about = {**fields, "prediction": prediction}
    return _inspect("log").EvalSample(
        id=id,
        epoch=1,
        input=fields["prompt"],
        choices=fields["candidates"] or None,
        target=fields["answer"] if fields["label"] is None else fields["label"],
        messages=messages,
        output=output,
        scores={
            metric: _inspect("scorer").Score(value=hit, answer=answer)
            for metric, hit in hits[sample.subset, sample.id].items()
        },
        metadata={key: about[key] for key in KEPT if about[key] not in (None, {})},
    )


def _results(values: Sequence[Value], hits: Outcomes, rows: int) -> Any:
    """inspect's EvalResults: a scorer per metric, with its parts and companions."""
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
