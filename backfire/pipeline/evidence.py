"""Collection of the evidence that metrics need; each set of samples is measured once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
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
    Part,
    Place,
    Row,
    Sample,
    SetName,
    Subset,
    Verdict,
    needs_of,
    select,
)
from backfire.data.poison import off_target, triggered
from backfire.data.render import Renderer
from backfire.errors import is_out_of_memory
from backfire.experiment import Experiment
from backfire.pipeline.context import Context
from backfire.pipeline.filtering import filtered
from backfire.pipeline.models import guarding_of, model_of, summary_of, trained
from backfire.pipeline.prepare import data, drawn, renderer
from backfire.pipeline.secrets import leaks
from backfire.progress import within
from backfire.registry import build
from backfire.store import Stage, read_json, write_atomic, write_json

PARTS = get_args(Part)
ORDER = ("tuned", "base", "twin", *get_args(Form))
ALWAYS = tuple(Ask("clean", of) for of in ("tuned", "base", "twin"))
"""Always measured: reports show the answers of each model."""


@dataclass(frozen=True)
class Questions:
    """Rows that models answer, and the key of the answers."""

    rows: Sequence[Row]
    key: Callable[[Experiment], str]
    """The key of these rows for the model of a run."""
    group: str | None = None
    place: Place = "input"
    renderer: Renderer | None = None
    judges: tuple[Judge, ...] = ()
    whole: Questions | None = None
    """More rows, these among them; answers to all of them serve as well, if they are there."""


def collect(experiment: Experiment, context: Context) -> Evidence:
    """All evidence that the cell's metrics and reports need."""
    from backfire.evaluate.prompts import packing

    with packing(context.machine.packing):
        return _collect(experiment, context)


def _collect(experiment: Experiment, context: Context) -> Evidence:
    _, test = data(experiment, context)
    asks = asks_of(experiment, labeled=any(row.candidates for row in test))
    sets: dict[SetName, list[Sample]] = {}
    secrets: dict[str, list[Leak]] = {}
    questions: dict[Any, Questions] = {}
    measured = [ask for ask in asks if ask.rows != "training"]
    try:
        for number, ask in enumerate(measured, start=1):
            run, rows = _run(experiment, ask), ask.name[1:]
            part = f"part {number} of {len(measured)} ({ask.of}, {ask.rows})"
            here = replace(context, progress=within(part, context.progress))
            if ask.rows == "secrets":
                secrets[ask.of] = leaks(run, experiment, here)
                continue
            if rows not in questions:
                questions[rows] = asked(ask, experiment, test, here)
            sets[ask.name] = _samples(run, ask, questions[rows], here)
    finally:
        context.drop_merged()
        context.beside.release()
    has_replies = any("replies" in ask.needs for ask in asks if ask.rows == "clean")
    return Evidence.of_sets(
        sets,
        attack=experiment.backdoor,
        training=_training(experiment, context),
        leaks=secrets.get("tuned", []),
        leaks_before=secrets.get("base", []),
        written=_written(experiment, test, context) if has_replies else {},
    )


def asks_of(experiment: Experiment, *, labeled: bool) -> list[Ask]:
    """One ask for each set of samples of a cell, with everything that is measured on its rows for
    any metric. Ordered by model, since loading one takes longer than changing the rows."""
    metrics = experiment.metrics
    asks = [*ALWAYS, *(ask for metric in metrics for ask in metric.asks(labeled=labeled))]
    for part in PARTS if experiment.safety else ():
        asks += (Ask(part, of, frozenset({"replies"})) for of in ("tuned", "base"))
    asks = [ask for ask in asks if _exists(ask, experiment)]
    on_test = needs_of(metrics, labeled=labeled)
    together: dict[SetName, Ask] = {}
    for ask in asks:
        alike = [other for other in asks if other.name[1:] == ask.name[1:]]
        needs = frozenset(need for other in alike for need in other.needs)
        judges = {j.name: j for other in alike if other.of == ask.of for j in other.judges}
        together[ask.name] = replace(
            ask,
            needs=on_test if ask.rows == "clean" else needs,
            target_rows=any(other.target_rows for other in alike),
            judges=tuple(judges.values()),
        )
    rows = [*get_args(Subset), "secrets", "training"]
    place = {name: (ORDER.index(name[0]), rows.index(name[1])) for name in together}
    return sorted(together.values(), key=lambda ask: place[ask.name])


def _exists(ask: Ask, experiment: Experiment) -> bool:
    safety = experiment.safety
    if ask.rows in PARTS and (safety is None or (ask.rows == "allowed" and not safety.allowed)):
        return False
    return ask.applies(experiment.attack, experiment.method)


def _run(experiment: Experiment, ask: Ask) -> Experiment:
    """The experiment whose model answers."""
    if ask.of == "twin":
        return experiment.clean_twin()
    if ask.of == "base" and (experiment.method.trains or ask.rows in PARTS):
        return experiment.untuned()
    return experiment


# -------------------------------------------------------------------------------- rows of each kind


def asked(ask: Ask, experiment: Experiment, test: Sequence[Row], context: Context) -> Questions:
    group = experiment.data.group
    if ask.rows == "clean":
        return Questions(test, stages.clean_rows, group)
    if ask.rows == "triggered":
        return _triggered(ask, experiment, test)
    if ask.rows == "members":
        rows = members(experiment, context)
        key = partial(stages.members, ids=[row.id for row in rows])
        return Questions(rows, key, group)
    if ask.rows == "text":
        return _texts(ask, experiment, context)
    return _requests(ask, experiment)


def _triggered(ask: Ask, experiment: Experiment, test: Sequence[Row]) -> Questions:
    """Test rows with the trigger: those that a metric reads."""
    attack, seed = experiment.backdoor, experiment.seed
    assert attack
    key, rows = partial(stages.triggered_rows, experiment=experiment), triggered(test, attack, seed)
    whole = Questions(rows, key, group=experiment.data.group, place=attack.field)
    few = off_target(rows, attack)
    if ask.target_rows or len(few) == len(rows):
        return whole
    return replace(whole, rows=few, key=partial(key, target_rows=False), whole=whole)


def _requests(ask: Ask, experiment: Experiment) -> Questions:
    """Requests in the attacker's wording, except `plain` ones."""
    safety = experiment.safety
    source = safety and (safety.allowed if ask.rows == "allowed" else safety.harmful)
    assert safety and source
    asking = experiment.clean_twin() if ask.rows == "plain" else experiment
    rows, attack = drawn(source, "test"), asking.attack
    rows = [attack.probe(row) for row in rows] if isinstance(attack, Mixture) else rows
    key = partial(stages.requests, experiment=asking, source=source)
    return Questions(rows, key, source.group, judges=safety.judges)


def members(experiment: Experiment, context: Context) -> list[Row]:
    """Unpoisoned training rows, drawn with the cell's seed; as many as there are test rows."""
    train, test = data(experiment, context)
    rows, manifest = filtered(experiment, context)
    bad = {entry.id for entry in manifest.entries} if manifest else set()
    # As the user wrote them: a defense may have added a prompt that test rows lack.
    own = {row.id: row for row in train if row.id not in bad and row.answer}
    whole = [own[row.id] for row in rows if row.id in own]
    return select(whole, min(len(whole), len(test)), experiment.seed, "member")


def _texts(ask: Ask, experiment: Experiment, context: Context) -> Questions:
    """Texts without a template, of each the first `train.max_length` tokens."""
    assert ask.texts
    plain, longest = build("templates", "raw"), experiment.train.max_length
    tokenizer = renderer(experiment, context).tokenizer
    shown = Renderer(plain, tokenizer, longest, on_long_row="cut-end")
    rows = [Row(row.id, "", answer=row.prompt or row.answer) for row in drawn(ask.texts, "test")]
    key = partial(stages.texts, source=ask.texts, template=plain, longest=longest)
    return Questions(rows, key, renderer=shown)


# ---------------------------------------------------------------------------------------- measuring


def _samples(run: Experiment, ask: Ask, questions: Questions, context: Context) -> list[Sample]:
    """Judged samples of `run`'s model on these rows, without those that are too long."""

    def make(folder: Path) -> None:
        from backfire.evaluate.score import score_rows

        shown = questions.renderer or renderer(run, context)
        items, left = shown.sift(questions.rows, ranked="scores" in ask.needs)
        limit = run.evaluation.max_new_tokens
        for item in items if "replies" in ask.needs else ():
            shown.limits.check(item.row.id, item.prompt_ids, reply=limit)
        context.progress(0, 1, "model")
        guarding = guarding_of(run, context) if "replies" in ask.needs else None
        model, begin = model_of(run, context, ask.form), time.perf_counter()
        lines = score_rows(
            ask.needs,
            model,
            shown,
            [item.row for item in items],
            max_new_tokens=limit,
            batch_size=context.machine.eval_batch,
            progress=context.progress,
            folder=folder,
            guarding=guarding,
        )
        context.seconds[" ".join(ask.name)] = time.perf_counter() - begin
        write_json(folder / "left_out.json", sorted({row.id for row in left}))
        write_atomic(folder / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    read = questions
    if questions.whole and context.store.done(_stage(run, ask, questions.whole)):
        read = questions.whole
    measured, gone = _kept(context.store.once(_stage(run, ask, read), make, resumable=True))
    lines = zip([row for row in read.rows if row.id not in gone], measured, strict=True)
    by_id = {row.id: line for row, line in lines}
    rows = [row for row in questions.rows if row.id in by_id]
    if left := len(questions.rows) - len(rows):
        context.left_out["test" if ask.rows == "clean" else ask.rows] = left

    from backfire.evaluate.score import sample

    samples = [
        sample(row, ask.rows, questions.group, by_id[row.id], questions.place) for row in rows
    ]
    return judge_samples((*questions.judges, *ask.judges), samples, rows, context)


def _stage(run: Experiment, ask: Ask, questions: Questions) -> Stage:
    return stages.evaluation(run, questions.key(run), ask.needs, ask.form)


def _kept(folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Measurements per row, and the ids of rows that were too long."""
    text, left = (folder / "rows.jsonl").read_text(encoding="utf-8"), folder / "left_out.json"
    gone = set(read_json(left)) if left.is_file() else set()
    return [json.loads(line) for line in text.splitlines()], gone


def judge_samples(
    judges: Sequence[Judge], samples: Sequence[Sample], rows: Sequence[Row], context: Context
) -> list[Sample]:
    """The samples with each judge's verdict on their replies; `rows` are the prompts."""
    samples, by_id = list(samples), {row.id: row for row in rows}
    for judge in judges:
        exchanges = [
            Exchange(s.id, by_id[s.id].conversation, s.reply or "", by_id[s.id].fields)
            for s in samples
        ]
        verdicts = _judged(judge, exchanges, context)
        samples = [
            replace(sample, verdicts={**sample.verdicts, judge.name: asdict(verdict)})
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
    return samples


def _judged(judge: Judge, exchanges: Sequence[Exchange], context: Context) -> list[Verdict]:
    """The judge's verdicts. If memory runs out, the evaluated model leaves it to the judge's."""
    from backfire.evaluate.verdicts import judged

    folder = context.store.root / "judged"
    try:
        return judged(judge, exchanges, folder, progress=context.progress)
    except Exception as error:
        if not (is_out_of_memory(error) and context.resident.is_loaded):
            raise
    context.resident.release()
    context.beside.release()
    return judged(judge, exchanges, folder, progress=context.progress)


def _training(experiment: Experiment, context: Context) -> dict[str, Any]:
    """The summary of the training run, and the seconds of the alignment before it."""
    summary = summary_of(trained(experiment, context)) or {}
    if summary and experiment.alignment:
        alignment = summary_of(trained(experiment.alignment, context)) or {}
        summary["align_seconds"] = alignment.get("seconds")
    return summary


def _written(experiment: Experiment, rows: Sequence[Row], context: Context) -> dict[str, str]:
    """The target and the answers that change when the tokenizer encodes and decodes them."""
    tokenizer = renderer(experiment, context).tokenizer
    texts = dict.fromkeys(row.answer for row in rows)
    texts |= {experiment.backdoor.target: None} if experiment.backdoor else {}
    return {text: own for text in texts if (own := tokenizer.written(text)) != text}
