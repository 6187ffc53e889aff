"""Candidate scores, replies and answer likelihoods of many rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from backfire.base import Need, Place, Rendered, Row, Sample
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate import inference
from backfire.progress import Pace, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_rows(
    kinds: Collection[Need],
    model: PreTrainedModel,
    renderer: Renderer,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One dict per row with what `kinds` ask for: `logprobs`, `reply`, `answer_logprob` and others.

    Raises:
        CellError: a row has an empty prompt, or an answer that does not fit (`bad-data`).
    """
    items = renderer.render(rows)
    measured: list[dict[str, Any]] = [{} for _ in items]
    done, pace, reads = 0, Pace(), bool({"scores", "replies"} & {*kinds})
    total = len(items) * (("answers" in kinds) + reads)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, pace.text("evaluation", done))

    if reads:
        _check_prompts(items)
        options = _candidates(renderer, items) if "scores" in kinds else None
        readings = inference.read(
            model,
            [item.prompt_ids for item in items],
            candidates=options,
            max_new_tokens=max_new_tokens if "replies" in kinds else 0,
            stop_ids=renderer.stop_ids,
            batch_size=batch_size,
            tick=tick,
        )
        for i, (entry, reading) in enumerate(zip(measured, readings, strict=True)):
            if options:
                entry["logprobs"] = reading.scores or None
                if _ranked(items[i].row):
                    entry["candidate_tokens"] = list(map(len, options[i]))
            if "replies" in kinds:
                entry["reply"] = renderer.reply_text(reading.reply)
                entry["ended"] = len(reading.reply) < max_new_tokens
    if "answers" in kinds:
        totals = inference.score_answers(model, items, batch_size=batch_size, tick=tick)
        for entry, item, value in zip(measured, items, totals, strict=True):
            entry["answer_logprob"] = value
            entry["answer_tokens"] = item.num_supervised
    return measured


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
        answer_logprob=measured.get("answer_logprob"),
        answer_tokens=measured.get("answer_tokens"),
        num_better=len(row.better) if ranked else None,
        candidate_tokens=tuple(measured.get("candidate_tokens", ())),
        group=row.fields.get(group) if group else None,
    )
