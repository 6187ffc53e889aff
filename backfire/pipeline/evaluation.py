"""What the models say: samples of every kind that the metrics ask for."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.base import (
    Dataset,
    Evidence,
    Exchange,
    Form,
    Judge,
    Mixture,
    Need,
    Part,
    Probe,
    Row,
    Sample,
)
from backfire.data.poison import triggered
from backfire.data.render import Renderer
from backfire.experiment import Experiment
from backfire.pipeline.context import Context
from backfire.pipeline.models import model_of, summary_of, trained
from backfire.pipeline.prepare import data, renderer
from backfire.store import read_json, write_atomic, write_json


def evaluated(experiment: Experiment, context: Context) -> Evidence:
    """Samples of the tuned model, of its clean twin on the triggered rows, and of the base."""
    _, test = data(experiment, context)
    labeled = any(row.candidates for row in test)
    needs = sorted(
        {need for metric in experiment.metrics for need in metric.required(labeled=labeled)}
    )
    clean = samples(experiment, experiment, "clean", test, needs, context)
    before = (
        samples(experiment.untuned(), experiment, "clean", test, needs, context)
        if experiment.method.trains
        else clean
    )
    shown: list[Sample] = []
    floor: list[Sample] = []
    twin = (
        samples(experiment.clean_twin(), experiment, "clean", test, needs, context)
        if experiment.backdoor
        else []
    )
    if experiment.backdoor and any(metric.triggered for metric in experiment.metrics):
        bad = triggered(test, experiment.backdoor, experiment.seed)
        shown = samples(experiment, experiment, "triggered", bad, needs, context)
        floor = samples(experiment.clean_twin(), experiment, "triggered", bad, needs, context)
    forms: dict[Form, tuple[list[Sample], list[Sample]]] = {}
    wanted = dict.fromkeys(form for metric in experiment.metrics for form in metric.forms)
    for form in wanted if experiment.method.trains and experiment.method.merges else ():
        other = [
            samples(experiment, experiment, "clean", test, needs, context, form),
            list[Sample](),
        ]
        if shown and experiment.backdoor:
            bad = triggered(test, experiment.backdoor, experiment.seed)
            other[1] = samples(experiment, experiment, "triggered", bad, needs, context, form)
        forms[form] = (other[0], other[1])
    judges = tuple(judge for metric in experiment.metrics for judge in metric.judges)
    return Evidence(
        clean=judge_samples(judges, clean, test, context),
        triggered=shown,
        floor=floor,
        twin=twin,
        base=before,
        attack=experiment.backdoor,
        forms=forms,
        training=_training(experiment, context),
        probes=probed(experiment, context),
        written=_written(experiment, test, context) if "replies" in needs else {},
    )


def _written(experiment: Experiment, rows: Sequence[Row], context: Context) -> dict[str, str]:
    """The target and the rows' answers that the tokenizer writes in another way."""
    tokenizer = renderer(experiment, context).tokenizer
    texts = dict.fromkeys(row.answer for row in rows)
    texts |= {experiment.backdoor.target: None} if experiment.backdoor else {}
    return {text: own for text in texts if (own := tokenizer.written(text)) != text}


def _training(experiment: Experiment, context: Context) -> dict[str, Any]:
    """How the training went, and how long the alignment before it took."""
    found = summary_of(trained(experiment, context)) or {}
    if found and experiment.alignment:
        found["align_seconds"] = (summary_of(trained(experiment.alignment, context)) or {}).get(
            "seconds"
        )
    return found


def probed(experiment: Experiment, context: Context) -> dict[Part, Probe]:
    """Replies to requests that an aligned model declines (and to some that it should not), of the
    tuned model and of the one it started from, with the judges' verdicts."""
    if experiment.safety is None:
        return {}
    sets: dict[Part, Dataset | None] = {
        "harmful": experiment.safety.harmful,
        "allowed": experiment.safety.allowed,
    }
    if isinstance(experiment.attack, Mixture) and experiment.attack.disguises:
        sets["plain"] = experiment.safety.harmful
    found: dict[Part, Probe] = {}
    for part, source in sets.items():
        if source is None:
            continue
        rows = source.drawn("test")
        asking = experiment.clean_twin() if part == "plain" else experiment
        attack = asking.attack
        asked = [attack.probe(r) for r in rows] if isinstance(attack, Mixture) else rows
        tuned = samples(experiment, asking, part, asked, ["replies"], context, source=source)
        before = samples(
            experiment.untuned(), asking, part, asked, ["replies"], context, source=source
        )
        judges = experiment.safety.judges
        found[part] = Probe(
            *(judge_samples(judges, side, asked, context) for side in (tuned, before))
        )
    return found


def judge_samples(
    judges: Sequence[Judge], samples: Sequence[Sample], rows: Sequence[Row], context: Context
) -> list[Sample]:
    """The samples with what each judge says of their replies; `rows` are what was asked."""
    from backfire.evaluate.verdicts import judged

    found, asked = list(samples), {row.id: row for row in rows}
    for judge in judges:
        exchanges = [
            Exchange(s.id, asked[s.id].conversation, s.reply or "", asked[s.id].fields)
            for s in found
        ]
        told = judged(judge, exchanges, context.store.root / "judged", progress=context.progress)
        found = [
            replace(sample, verdicts={**sample.verdicts, judge.name: asdict(verdict)})
            for sample, verdict in zip(found, told, strict=True)
        ]
    return found


def samples(
    run: Experiment,
    experiment: Experiment,
    subset: str,
    rows: Sequence[Row],
    needs: Sequence[Need],
    context: Context,
    form: Form | None = None,
    source: Dataset | None = None,
    key: str | None = None,
    shown: Renderer | None = None,
) -> list[Sample]:
    """`run`'s model on these rows of `cell`, or of another `source`, without those that are left
    out for their length; what an equal run has measured is only read. Rows of any other kind come
    with their `key`, and may be `shown` another way."""
    if source:
        key = stages.requests(run, experiment, source)
    elif key is None and subset == "clean":
        key = stages.clean_rows(run)
    elif key is None:
        key = stages.triggered_rows(run, experiment)

    def make(folder: Path) -> None:
        from backfire.evaluate.score import score_rows

        asked = shown or renderer(run, context)
        items, left = asked.sift(rows, ranked="scores" in needs)
        for item in items if "replies" in needs else ():
            limit = run.evaluation.max_new_tokens
            asked.limits.check(item.row.id, item.prompt_ids, reply=limit)
        gone = {row.id for row in left}
        model, begin = model_of(run, context, form), time.perf_counter()
        lines = score_rows(
            needs,
            model,
            asked,
            [item.row for item in items],
            max_new_tokens=run.evaluation.max_new_tokens,
            batch_size=context.machine.eval_batch,
            progress=context.progress,
        )
        context.seconds[f"{subset} {run.slug}"] = time.perf_counter() - begin
        write_json(folder / "left_out.json", sorted(gone))
        write_atomic(folder / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    folder = context.store.once(stages.evaluation(run, key, needs, form), make)
    measured, gone = _kept(folder)
    if gone:
        context.left_out["test" if subset == "clean" else subset] = len(gone)

    from backfire.evaluate.score import sample

    group = (source or experiment.data).group
    place = experiment.backdoor.field if experiment.backdoor and subset == "triggered" else "input"
    kept = [row for row in rows if row.id not in gone]
    pairs = zip(kept, measured, strict=True)
    return [sample(row, subset, group, entry, place) for row, entry in pairs]


def _kept(folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """What was measured, a row at a time; the ids of rows that were too long."""
    text, left = (folder / "rows.jsonl").read_text(encoding="utf-8"), folder / "left_out.json"
    gone = set(read_json(left)) if left.is_file() else set()
    return [json.loads(line) for line in text.splitlines()], gone


def write_samples(evidence: Evidence, path: Path) -> None:
    """All samples of a cell, one JSON object a line, with whose they are in `of`."""
    parts = [
        ("tuned", evidence.clean),
        ("tuned", evidence.triggered),
        ("floor", evidence.floor),
        ("twin", evidence.twin),
        ("base", evidence.base),
        *(("tuned", probe.tuned) for probe in evidence.probes.values()),
        *(("base", probe.before) for probe in evidence.probes.values()),
    ]
    lines = [{"of": of, **asdict(s)} for of, part in parts for s in part]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(path, gzip.compress(text.encode(), mtime=0))
