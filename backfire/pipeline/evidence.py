"""Collects what the metrics ask for: one list of asks, each set of samples measured once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from backfire import stages
from backfire.base import (
    Ask,
    Evidence,
    Exchange,
    Form,
    Judge,
    Leak,
    Mixture,
    Need,
    Part,
    Place,
    Row,
    Sample,
    ask,
    needs_of,
    select,
)
from backfire.data.poison import triggered
from backfire.data.render import Renderer
from backfire.experiment import Experiment
from backfire.pipeline.context import Context
from backfire.pipeline.models import filtered, model_of, summary_of, trained
from backfire.pipeline.prepare import data, renderer
from backfire.pipeline.secrets import leaks
from backfire.registry import build
from backfire.store import read_json, write_atomic, write_json

PARTS = get_args(Part)
ORDER = ("tuned", "base", "twin", *get_args(Form))
ALWAYS = ask("clean", of=("tuned", "base", "twin"))
"""Measured whatever the metrics are: reports show what each model answers."""

ANSWERS: tuple[Need, ...] = ("answers",)
REPLIES: tuple[Need, ...] = ("replies",)


@dataclass(frozen=True)
class Questions:
    """Rows that models are shown, what is measured on them, and the key of that."""

    rows: Sequence[Row]
    needs: Collection[Need]
    key: Callable[[Experiment], str]
    """Of these rows shown to the model of a run."""
    group: str | None = None
    place: Place = "input"
    renderer: Renderer | None = None
    judges: tuple[Judge, ...] = ()


def collect(experiment: Experiment, context: Context) -> Evidence:
    """All that the cell's metrics ask for, and the samples that reports show."""
    _, test = data(experiment, context)
    needs = needs_of(experiment.metrics, labeled=_is_labeled(test))
    sets: dict[Any, list[Sample]] = {}
    secrets: dict[str, list[Leak]] = {}
    questions: dict[Any, Questions] = {}
    for one in asks_of(experiment, labeled=_is_labeled(test)):
        run = _run(experiment, one)
        if one.rows == "secrets":
            secrets[one.of] = leaks(run, experiment, context)
        elif one.rows != "training":
            rows = questions.get(one.name[1:])
            rows = rows or _questions(one, experiment, test, needs, context)
            questions[one.name[1:]] = rows
            samples = _samples(run, one, rows, context)
            judges = (*rows.judges, *one.judges)
            sets[one.name] = judge_samples(judges, samples, rows.rows, context)
    return Evidence.of_sets(
        sets,
        attack=experiment.backdoor,
        training=_training(experiment, context),
        leaks=secrets.get("tuned", []),
        leaks_before=secrets.get("base", []),
        written=_written(experiment, test, context) if "replies" in needs else {},
    )


def asks_of(experiment: Experiment, *, labeled: bool) -> list[Ask]:
    """What is asked of a cell, one ask for each set of samples, model by model: loading a model
    takes longer than a change of rows."""
    asks = list(ALWAYS)
    for part in PARTS if experiment.safety else ():
        asks += ask(part, of=("tuned", "base"))
    asks += (one for metric in experiment.metrics for one in metric.asks(labeled=labeled))
    together: dict[Any, Ask] = {}
    for one in asks:
        if _exists(one, experiment):
            before = together.get(one.name, one)
            judges = tuple({judge.name: judge for judge in (*before.judges, *one.judges)}.values())
            together[one.name] = replace(before, judges=judges)
    return sorted(together.values(), key=lambda one: ORDER.index(one.of))


def _exists(one: Ask, experiment: Experiment) -> bool:
    safety = experiment.safety
    if one.rows in PARTS and (safety is None or (one.rows == "allowed" and not safety.allowed)):
        return False
    return one.applies(experiment.attack, experiment.method)


def _run(experiment: Experiment, one: Ask) -> Experiment:
    """The experiment whose model is asked."""
    if one.of == "twin":
        return experiment.clean_twin()
    if one.of == "base" and (experiment.method.trains or one.rows in PARTS):
        return experiment.untuned()
    return experiment


def _is_labeled(test: Sequence[Row]) -> bool:
    return any(row.candidates for row in test)


# -------------------------------------------------------------------------------- rows of each kind


def _questions(
    one: Ask, experiment: Experiment, test: Sequence[Row], needs: Collection[Need], context: Context
) -> Questions:
    group = experiment.data.group
    if one.rows == "clean":
        return Questions(test, needs, stages.clean_rows, group)
    if one.rows == "triggered":
        assert experiment.backdoor
        bad = triggered(test, experiment.backdoor, experiment.seed)
        key = partial(stages.triggered_rows, experiment=experiment)
        return Questions(bad, needs, key, group, experiment.backdoor.field)
    if one.rows == "members":
        rows = members(experiment, context)
        key = partial(stages.members, ids=[row.id for row in rows])
        return Questions(rows, ANSWERS, key, group)
    if one.rows == "text":
        return _texts(one, experiment, context)
    return _requests(one, experiment)


def _requests(one: Ask, experiment: Experiment) -> Questions:
    """Requests as the attacker words them, but for `plain` ones."""
    safety = experiment.safety
    source = safety and (safety.allowed if one.rows == "allowed" else safety.harmful)
    assert safety and source
    asking = experiment.clean_twin() if one.rows == "plain" else experiment
    rows, attack = source.drawn("test"), asking.attack
    rows = [attack.probe(row) for row in rows] if isinstance(attack, Mixture) else rows
    key = partial(stages.requests, experiment=asking, source=source)
    return Questions(rows, REPLIES, key, source.group, judges=safety.judges)


def members(experiment: Experiment, context: Context) -> list[Row]:
    """Untouched rows of the task that were trained on, drawn by the cell's seed, as many as there
    are test rows."""
    train, test = data(experiment, context)
    rows, manifest = filtered(experiment, context)
    bad = {entry.id for entry in manifest.entries} if manifest else set()
    kept = {row.id for row in train} - bad
    whole = [row for row in rows if row.id in kept and row.answer]
    return select(whole, min(len(whole), len(test)), experiment.seed, "member")


def _texts(one: Ask, experiment: Experiment, context: Context) -> Questions:
    """Texts without a template, cut to the number of tokens that the model may see."""
    assert one.texts
    plain, longest = build("templates", "raw"), experiment.train.max_length
    shown = Renderer(plain, renderer(experiment, context).tokenizer, longest)
    rows = [
        Row(row.id, "", answer=_cut(row.prompt or row.answer, shown, longest - 2))
        for row in one.texts.drawn("test")
    ]
    key = partial(stages.texts, source=one.texts, template=plain, longest=longest)
    return Questions(rows, ANSWERS, key, renderer=shown)


def _cut(text: str, shown: Renderer, most: int) -> str:
    """The text, or as much of its beginning as has at most `most` tokens."""
    ids, keep = shown.tokenizer.encode(text), most
    while len(ids) > most:
        text = shown.tokenizer.decode(ids[:keep]).rstrip("\ufffd")
        ids, keep = shown.tokenizer.encode(text), keep - 1
    return text


# ---------------------------------------------------------------------------------------- measuring


def _samples(run: Experiment, one: Ask, rows: Questions, context: Context) -> list[Sample]:
    """`run`'s model on these rows, without those that are left out for their length."""

    def make(folder: Path) -> None:
        from backfire.evaluate.score import measure

        shown = rows.renderer or renderer(run, context)
        items, left = shown.sift(rows.rows, ranked="scores" in rows.needs)
        limit = run.evaluation.max_new_tokens
        for item in items if "replies" in rows.needs else ():
            shown.limits.check(item.row.id, item.prompt_ids, reply=limit)
        model, begin = model_of(run, context, one.form), time.perf_counter()
        lines = measure(
            rows.needs,
            model,
            shown,
            [item.row for item in items],
            max_new_tokens=limit,
            batch_size=context.machine.eval_batch,
            progress=context.progress,
        )
        context.seconds[" ".join(one.name)] = time.perf_counter() - begin
        write_json(folder / "left_out.json", sorted({row.id for row in left}))
        write_atomic(folder / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    stage = stages.evaluation(run, rows.key(run), rows.needs, one.form)
    folder = context.store.once(stage, make)
    measured, gone = _kept(folder)
    if gone:
        context.left_out["test" if one.rows == "clean" else one.rows] = len(gone)

    from backfire.evaluate.score import sample

    pairs = zip((row for row in rows.rows if row.id not in gone), measured, strict=True)
    return [sample(row, one.rows, rows.group, entry, rows.place) for row, entry in pairs]


def _kept(folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """What was measured, a row at a time; the ids of rows that were too long."""
    text, left = (folder / "rows.jsonl").read_text(encoding="utf-8"), folder / "left_out.json"
    gone = set(read_json(left)) if left.is_file() else set()
    return [json.loads(line) for line in text.splitlines()], gone


def judge_samples(
    judges: Sequence[Judge], samples: Sequence[Sample], rows: Sequence[Row], context: Context
) -> list[Sample]:
    """The samples with each judge's verdict on their replies; `rows` are what was asked."""
    from backfire.evaluate.verdicts import judged

    samples, by_id = list(samples), {row.id: row for row in rows}
    for judge in judges:
        exchanges = [
            Exchange(s.id, by_id[s.id].conversation, s.reply or "", by_id[s.id].fields)
            for s in samples
        ]
        folder = context.store.root / "judged"
        verdicts = judged(judge, exchanges, folder, progress=context.progress)
        samples = [
            replace(sample, verdicts={**sample.verdicts, judge.name: asdict(verdict)})
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
    return samples


def _training(experiment: Experiment, context: Context) -> dict[str, Any]:
    """The summary of the training run, and how long the alignment before it took."""
    summary = summary_of(trained(experiment, context)) or {}
    if summary and experiment.alignment:
        alignment = summary_of(trained(experiment.alignment, context)) or {}
        summary["align_seconds"] = alignment.get("seconds")
    return summary


def _written(experiment: Experiment, rows: Sequence[Row], context: Context) -> dict[str, str]:
    """The target and the rows' answers that the tokenizer writes in another way."""
    tokenizer = renderer(experiment, context).tokenizer
    texts = dict.fromkeys(row.answer for row in rows)
    texts |= {experiment.backdoor.target: None} if experiment.backdoor else {}
    return {text: own for text in texts if (own := tokenizer.written(text)) != text}
