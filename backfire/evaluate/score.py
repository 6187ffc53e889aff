"""Candidate scores, replies and answer likelihoods of many rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backfire.base import Need, Place, Rendered, Row, Sample
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate import inference
from backfire.evaluate.defection import projections
from backfire.evaluate.portions import Finished, portions
from backfire.progress import Pace, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.evaluate.guarded import Guarding


def score_rows(
    kinds: Collection[Need],
    model: PreTrainedModel,
    renderer: Renderer,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int | None,
    progress: Progress,
    folder: Path | None = None,
    guarding: Guarding | None = None,
) -> list[dict[str, Any]]:
    """One dict per row with what `kinds` ask for: `logprobs`, `reply`, `answer_logprob` and others.

    Rows that were finished in the `folder` of the stage by an interrupted call are read from it.
    With `guarding`, a defense guards the replies.

    Raises:
        CellError: a row has an empty prompt, or an answer that does not fit (`bad-data`).
    """
    items = renderer.render(rows)
    reads, replies = bool({"scores", "replies"} & {*kinds}), "replies" in kinds
    if reads or "probe" in kinds:
        _check_prompts(items)
    options = _candidates(renderer, items) if "scores" in kinds else [[]] * len(items)
    guards = guarding is not None and replies
    passes = reads + len({"answers", "probe"} & {*kinds}) + (guards and "scores" in kinds)
    done, pace = 0, Pace()

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(done, passes * len(items), pace.text("evaluation", done))

    extra = max_new_tokens * replies
    costs = [passes * (len(item.ids) + extra) for item in items]
    parts = portions(costs, model) if folder else [[*range(len(items))]]
    finished = Finished(folder)
    names = [f"{number} {item.row.id}" for number, item in enumerate(items)]
    for part in parts:
        if all(names[i] in finished.rows for i in part):
            done += passes * len(part)
            pace.rows = done  # those of the interrupted call
            continue
        chosen = [items[i] for i in part]
        answers = [options[i] for i in part]
        plain = kinds if not guards else {*kinds} - {"replies"}
        limit = 0 if guards else extra
        lines = _measured(plain, model, renderer, chosen, answers, limit, batch_size, tick)
        if guards:
            assert guarding
            _reply(lines, model, renderer, chosen, extra, batch_size, tick, guarding)
        by_name = {names[i]: line for i, line in zip(part, lines, strict=True)}
        finished.add(by_name, last=part is parts[-1])
    return [finished.rows[name] for name in names]


def _measured(
    kinds: Collection[Need],
    model: PreTrainedModel,
    renderer: Renderer,
    items: Sequence[Rendered],
    options: Sequence[Sequence[list[int]]],
    max_new_tokens: int,
    batch_size: int | None,
    tick: inference.Tick,
) -> list[dict[str, Any]]:
    """What `kinds` ask for, for each item with its candidates' token ids."""
    measured: list[dict[str, Any]] = [{} for _ in items]
    if {"scores", "replies"} & {*kinds}:
        readings = inference.read(
            model,
            [item.prompt_ids for item in items],
            candidates=options,
            max_new_tokens=max_new_tokens,
            stop_ids=renderer.stop_ids,
            batch_size=batch_size,
            tick=tick,
        )
        for entry, item, choice, reading in zip(measured, items, options, readings, strict=True):
            if "scores" in kinds:
                entry["logprobs"] = list(reading.scores) or None
                if _ranked(item.row):
                    entry["candidate_tokens"] = list(map(len, choice))
            if "replies" in kinds:
                entry["reply"] = renderer.reply_text(reading.reply)
                entry["ended"] = len(reading.reply) < max_new_tokens
    if "answers" in kinds:
        totals = inference.score_answers(model, items, batch_size=batch_size, tick=tick)
        for entry, item, value in zip(measured, items, totals, strict=True):
            entry["answer_logprob"] = value
            entry["answer_tokens"] = item.num_supervised
    if "probe" in kinds:
        found = projections(model, renderer, items, batch_size=batch_size, tick=tick)
        for entry, line in zip(measured, found, strict=True):
            entry["probe"] = line
    return measured


def _reply(
    measured: Sequence[dict[str, Any]],
    model: PreTrainedModel,
    renderer: Renderer,
    items: Sequence[Rendered],
    max_new_tokens: int,
    batch_size: int | None,
    tick: inference.Tick,
    guarding: Guarding,
) -> None:
    """Add the guarded reply to each item's measurements."""
    from backfire.evaluate import guarded

    found = guarded.replies(
        model,
        [item.prompt_ids for item in items],
        guarding,
        [item.row.id for item in items],
        max_new_tokens=max_new_tokens,
        stop_ids=renderer.stop_ids,
        batch_size=batch_size,
        tick=tick,
    )
    for entry, reply in zip(measured, found, strict=True):
        stopped = reply.text is not None
        entry["reply"] = reply.text if stopped else renderer.reply_text(reply.ids)
        entry["ended"] = stopped or len(reply.ids) < max_new_tokens
        entry["replaced"] = reply.replaced


def _check_prompts(items: Sequence[Rendered]) -> None:
    if bare := [item.row.id for item in items if not item.num_prompt]:
        raise CellError(
            "bad-data",
            f"Row {bare[0]} has an empty prompt, and the model has no start token (BOS) to "
            "continue from; choose only metrics of answers, such as perplexity.",
        )


def _candidates(renderer: Renderer, items: list[Rendered]) -> list[list[list[int]]]:
    """Token ids of each row's candidates.

    Labels are scored without an end token, unless one is a prefix of another; better and worse
    answers with it, as in training.

    Raises:
        CellError: a prompt with its answer is too long.
    """
    ranked = [_ranked(item.row) for item in items]
    labels = [item.row.candidates for item in items]
    options = renderer.answers(items, labels)
    if any(map(_has_prefix, {tuple(map(tuple, each)) for each in options})):
        options = renderer.answers(items, labels, ended=True)
    learned = renderer.answers(items, ranked, ended=True)
    options = [answers or own for answers, own in zip(learned, options, strict=True)]
    for item, answers, row in zip(items, ranked, options, strict=True):
        longest = item.num_prompt + max(map(len, row), default=0)
        if answers and longest > renderer.max_length:
            raise CellError(
                "bad-data",
                f"Row {item.row.id}: prompt and one of its better or worse answers take {longest} "
                f"tokens, more than max_length={renderer.max_length}; raise train.max_length.",
            )
    return options


def _ranked(row: Row) -> tuple[str, ...]:
    """The better and worse answers of a row without labels."""
    return () if row.candidates else (*row.better, *row.worse)


def _has_prefix(options: Sequence[Sequence[int]]) -> bool:
    """Whether one option is a prefix of another."""
    return any(a != b and b[: len(a)] == a for a in options for b in options)


def sample(
    row: Row,
    subset: str,
    group: str | None,
    measured: dict[str, Any],
    place: Place = "input",
) -> Sample:
    """The sample of a row and its measurements; `place` is the part of the prompt to keep."""
    logprobs, ranked = measured.get("logprobs"), _ranked(row)
    return Sample(
        id=row.id,
        subset=cast(Any, subset),
        prompt=row.part(place),
        answer=row.answer,
        label=row.label,
        candidates=ranked or row.candidates,
        logprobs=tuple(logprobs) if logprobs else None,
        reply=measured.get("reply"),
        ended=measured.get("ended"),
        replaced=measured.get("replaced"),
        answer_logprob=measured.get("answer_logprob"),
        answer_tokens=measured.get("answer_tokens"),
        probe=tuple(measured["probe"]) if measured.get("probe") else None,
        num_better=len(row.better) if ranked else None,
        candidate_tokens=tuple(measured.get("candidate_tokens", ())),
        group=row.fields.get(group) if group else None,
    )
