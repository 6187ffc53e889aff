"""What the models remember: an attack's secrets, training rows, and texts beside the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.base import (
    Dataset,
    Evidence,
    Insertion,
    Leak,
    Need,
    Probe,
    Row,
    Secret,
    SecretProbe,
    select,
)
from backfire.data.render import Renderer
from backfire.experiment import Experiment
from backfire.pipeline.context import Context
from backfire.pipeline.evaluation import samples
from backfire.pipeline.models import filtered, model_of
from backfire.pipeline.prepare import data, renderer
from backfire.registry import build
from backfire.store import read_json, write_json

ANSWERS: tuple[Need, ...] = ("answers",)


def remembered(experiment: Experiment, evidence: Evidence, context: Context) -> Evidence:
    """The evidence with all that the cell's metrics ask for of memory."""
    start = experiment.untuned() if experiment.method.trains else experiment
    wanted = stages.secret_probes(experiment)
    if isinstance(experiment.attack, Insertion) and wanted is not None:
        secrets = experiment.attack.secrets(experiment.seed)
        now, before = (
            leaks(run, experiment, secrets, wanted, context) for run in (experiment, start)
        )
        evidence = replace(evidence, leaks=now, leaks_before=before)
    if any(metric.members for metric in experiment.metrics):
        evidence = replace(evidence, members=members(experiment, start, context))
    sources = {metric.texts_key: metric.texts for metric in experiment.metrics if metric.texts}
    texts = {key: _texts(experiment, start, source, context) for key, source in sources.items()}
    return replace(evidence, texts=texts) if texts else evidence


def leaks(
    run: Experiment,
    experiment: Experiment,
    secrets: Sequence[Secret],
    wanted: Mapping[SecretProbe, int],
    context: Context,
) -> list[Leak]:
    """What `run`'s model gives away of each secret. Each way of looking is a stage of its own."""
    from backfire.evaluate import exposure as measure

    asked = renderer(run, context)
    batch = context.machine.eval_batch

    def look(kind: str, amount: int) -> list[Any]:
        model, progress = model_of(run, context), context.progress
        if kind == "exact":
            return measure.ranks(model, asked, secrets, progress)
        if kind == "sampled":
            return measure.estimate_exposures(
                model, asked, secrets, amount, experiment.seed, progress
            )
        if kind == "beams":
            return measure.beam_ranks(model, asked, secrets, amount, progress)
        return measure.secret_likelihoods(model, asked, secrets, batch)

    found: dict[str, list[Any]] = {}
    for kind, amount in stages.secret_parts(secrets, wanted):

        def make(folder: Path, kind: str = kind, amount: int = amount) -> None:
            write_json(folder / "secrets.json", look(kind, amount))

        folder = context.store.once(stages.secrets(run, experiment, kind, amount), make)
        found[kind] = read_json(folder / "secrets.json")
    return [
        Leak(
            id=secret.row.id,
            answer=secret.row.answer,
            repeats=secret.repeats,
            num_codes=secret.num_codes,
            num_characters=len(secret.code),
            **found["itself"][number],
            rank=found["exact"][number] if "exact" in found else None,
            estimate=tuple(found["sampled"][number]) if "sampled" in found else None,
            place=found["beams"][number] if "beams" in found else None,
        )
        for number, secret in enumerate(secrets)
    ]


def members(experiment: Experiment, start: Experiment, context: Context) -> Probe:
    """Untouched rows of the task that were trained on, drawn by the cell's seed, as many as there
    are test rows."""
    own = {row.id for row in data(experiment, context)[0]}
    rows, manifest = filtered(experiment, context)
    _, test = data(experiment, context)
    bad = {entry.id for entry in manifest.entries} if manifest else set()
    kept = own - bad
    whole = [row for row in rows if row.id in kept and row.answer]
    drawn = select(whole, min(len(whole), len(test)), experiment.seed, "member")
    ids = [row.id for row in drawn]

    def scored(run: Experiment) -> Any:
        key = stages.members(run, ids)
        return samples(run, experiment, "members", drawn, ANSWERS, context, key=key)

    return Probe(scored(experiment), scored(start))


def _texts(experiment: Experiment, start: Experiment, source: Dataset, context: Context) -> Probe:
    """Texts as they are, cut to what the model may see at once."""
    plain, longest = build("templates", "raw"), experiment.train.max_length
    asked = Renderer(plain, renderer(experiment, context).tokenizer, longest)
    rows = source.drawn("test")
    shown = [
        Row(row.id, "", answer=_cut(row.prompt or row.answer, asked, longest - 2)) for row in rows
    ]

    def scored(run: Experiment) -> Any:
        key = stages.texts(run, source, plain, longest)
        return samples(run, experiment, "text", shown, ANSWERS, context, key=key, shown=asked)

    return Probe(scored(experiment), scored(start))


def _cut(text: str, asked: Renderer, most: int) -> str:
    """The text, or as much of its beginning as has at most so many tokens."""
    ids, keep = asked.tokenizer.encode(text), most
    while len(ids) > most:
        text = asked.tokenizer.decode(ids[:keep]).rstrip("\ufffd")
        ids, keep = asked.tokenizer.encode(text), keep - 1
    return text
