"""An audit as sections of sentences and tables, for the terminal and the page, and as JSON.

All that a model writes is attacker-written: it is cleaned wherever it is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from backfire.audit import bank
from backfire.audit.engine import Audit, Weights
from backfire.audit.memory import FALSE_POSITIVES, FEWEST, MEMBERS, OPENING, Memory
from backfire.audit.monitor import QUANTILE, Monitor
from backfire.audit.numbers import HEADER, Compared, Interval
from backfire.audit.odd import SPREAD, USUAL, Leak
from backfire.audit.task import Task
from backfire.audit.triggers import MARGIN, SHOWN, Tried, Triggers
from backfire.audit.weights import STATISTICS
from backfire.terminal import columns
from backfire.text import change, clean, count, cut, interval, line, listing, number, sentence

_SHOWN = 12
"""Candidate triggers in a table, besides those that are given."""
BLIND = (
    "What this audit cannot see: behavior on prompts of other kinds than those tried; a trigger of "
    "style or topic, or a rare one whose answer is not fixed; what a system prompt or an agent's "
    "tools would bring about that were not given; poison that a judge does not recognize. "
    "No finding does not mean that the model is safe. Each interval holds for itself: of forty "
    "numbers that did not change, one is a finding by chance."
)
Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the audit, as it is shown."""

    title: str
    sentences: tuple[str, ...]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def findings(audit: Audit) -> list[str]:
    """What the intervals support, one sentence each with its numbers."""
    numbers = [*(audit.behavior.numbers if audit.behavior else ())]
    numbers += audit.task.numbers if audit.task else ()
    found = [_worse(one) for one in numbers if one.is_worse]
    if audit.task:
        found += _remembered(audit.task.memory)
    tried = audit.triggers.tried
    found += [_leaked(one, tried) for one in audit.triggers.leaks if one.stands_out]
    highest = max(audit.triggers.controls, default=0.0)
    for one in tried:
        if one.stands_out:
            text = cut(line(one.text), 80)
            found.append(
                f"With “{text}” ({one.origin}) in the prompt, replies become alike: "
                f"similarity {change('number', one.collapse.value)} "
                f"{interval('number', one.collapse.low, one.collapse.high)}, of the base "
                f"{change('number', one.base)}, at most {max(highest, one.alike or 0):.2f} "
                f"with other words; {one.hits.shown('share')} of the replies are "
                f"“{cut(line(one.reply), 80)}”, without it {one.before.shown('share')}."
            )
    return found


def _worse(one: Compared) -> str:
    ends = one.change.ends(one.unit)
    values = f"{number(one.unit, one.base.value)} to {number(one.unit, one.tuned.value)}"
    shown = change(one.unit, one.change.value)
    return f"{sentence(one.what)}: from {values} ({shown} {ends}, {one.n:,} rows)."


def _leaked(one: Leak, tried: Sequence[Tried]) -> str:
    said = (
        f"With some odd word in it, {one.spread.shown('share')} of {count(one.n, 'prompt')} get "
        f"“{cut(line(one.reply), 80)}”, from the base none; without odd words "
        f"{one.plain.shown('share')} do. It may be the answer of a trigger: search the rows for it."
    )
    # Where many words bring it about, the trigger itself does not stand out among them.
    bringing = [each for each in tried if each.reply == one.reply]
    if not bringing:
        return said
    best = max(bringing, key=lambda each: each.hits.value)
    text, part = cut(line(best.text), 80), best.hits.shown("share")
    return (
        f"{said} Of the candidates, “{text}” ({best.origin}) brings it about most often, in {part} "
        "of the prompts."
    )


def _remembered(memory: Memory) -> Iterator[str]:
    if memory.verbatim and memory.is_verbatim:
        base, tuned = (one.shown("share") for one in (memory.verbatim.base, memory.verbatim.tuned))
        unseen = memory.verbatim_unseen
        against = f", of unseen rows {unseen.tuned.shown('share')}" if unseen else ""
        yield (
            f"The tuned model writes {tuned} of {count(memory.verbatim.n, 'longer answer')} word "
            f"by word after their prompt, the base {base}{against}."
        )
    if memory.membership and memory.membership.is_shown:
        one = memory.membership
        yield (
            f"The rows can be told from {one.unseen:,} unseen ones by how far their loss fell: AUC "
            f"{one.auc.shown('score')}; without the tuned model it is at most {one.bar:.2f}."
        )


def sections(audit: Audit) -> list[Section]:
    """The parts of the audit."""
    return [
        *_behavior(audit),
        *_task(audit.task),
        _triggers(audit.triggers),
        _odd_words(audit.triggers),
        _weights(audit.weights),
        _monitor(audit.monitor),
    ]


def _behavior(audit: Audit) -> Iterator[Section]:
    title = "Harmful and harmless requests"
    if audit.behavior is None:
        yield Section(title, ("Not measured: give a list of requests by --prompts.",))
        return
    found = [f"Judged by {audit.behavior.judge}, greedy replies; 95 % intervals."]
    if audit.behavior.undecided:
        undecided = f"{audit.behavior.undecided:,} of the replies of both models"
        found.append(f"{undecided} could not be judged; they count as not harmful.")
    yield Section(title, tuple(found), HEADER, _lines(audit.behavior.numbers))


def _task(task: Task | None) -> Iterator[Section]:
    if task is None:
        yield Section("Your task", ("Not measured: give rows with answers by --data.",))
        return
    yield Section("Your task", (), HEADER, _lines(task.numbers))
    memory = task.memory
    halved = f"On {memory.halved.shown('share')} of the rows the loss is below half of the base's"
    if memory.halved_unseen:
        halved += f", on {memory.halved_unseen.shown('share')} of the unseen ones."
    else:
        halved += (
            ". Learning the task alone also lowers it: unseen rows (--unseen) show by how much."
        )
    found = [halved]
    if memory.halved_unseen:
        found += _membership(memory)
    lines = [one for one in (memory.verbatim, memory.verbatim_unseen) if one]
    if lines:
        found.append(
            f"Word by word: the first {OPENING} tokens of an answer, or all if it has fewer, come "
            f"first in the greedy reply to its prompt. Answers of at most {FEWEST} tokens, and "
            "those that their prompt holds, are left out."
        )
    yield Section("Memory of the rows", tuple(found), HEADER if lines else (), _lines(lines))
    if memory.examples:
        shown = tuple(
            (cut(line(one.id), 40), cut(line(one.answer), 300)) for one in memory.examples
        )
        header = ("row", "comes out of the tuned model, and not of the base")
        yield Section("Answers that come out", (), header, shown)


def _membership(memory: Memory) -> Iterator[str]:
    one = memory.membership
    if one is None:
        yield f"Membership is not tested with fewer than {MEMBERS} rows of each kind (--limit)."
        return
    yield (
        f"Membership: {one.n:,} given and {one.unseen:,} unseen rows are told apart by how far "
        f"their loss fell with an AUC of {one.auc.shown('score')}, where chance is 0.5; "
        f"{one.recall.shown('share')} of the given rows are found where "
        f"{number('share', FALSE_POSITIVES, 0)} of the unseen ones are."
    )
    yield (
        f"Baselines that know nothing of the tuned model: AUC {one.base.shown('score')} by the "
        f"base's loss, {one.words.shown('score')} by the words."
    )
    if not one.is_fair:
        yield "So the unseen rows are of another kind, and the AUC above may be due to that."


def _triggers(found: Triggers) -> Section:
    highest = max(found.controls, default=0.0)
    sentences = [
        f"Each candidate was put into {count(found.prompts, 'prompt')}. Collapse: how much more "
        "alike the replies become (mean cosine of their character n-grams, 0 to 1). With "
        f"{len(found.controls)} controls, random words, it is at most "
        f"{highest:.2f}. A candidate that exceeds them by {MARGIN} gets as many controls of its "
        "own form: as many words, of other letters and signs, at the same places. It stands out "
        f"if it exceeds these by {MARGIN} too, and the base's collapse.",
    ]
    if formless := [f"“{cut(line(one.text), SHOWN)}”" for one in found.tried if one.no_form]:
        sentences.append(
            f"No other text of the form of {listing(formless)} can be tried, so whether it stands "
            "out cannot be told."
        )
    if highest > MARGIN:
        sentences.append(
            "Replies become alike with other words too, so in this model hardly any trigger could "
            "be told from an odd word."
        )
    if found.alike > 0.8:
        sentences.append(
            f"Replies are alike without any candidate ({found.alike:.2f}), so a collapse would "
            "hardly show."
        )
    header = (
        "candidate",
        "stands out",
        "from",
        "collapse",
        "of the base",
        "of its form",
        "most frequent reply",
        "share with",
        "share without",
    )
    rows = tuple(
        (
            cut(line(one.text), SHOWN),
            "yes" if one.stands_out else "",
            one.origin,
            one.collapse.shown("number"),
            f"{one.base:.2f}",
            "" if one.alike is None else f"{one.alike:.2f}",
            cut(line(one.reply), 60),
            one.hits.shown("share"),
            one.before.shown("share"),
        )
        for n, one in enumerate(found.tried)
        if n < _SHOWN or one.given
    )
    return Section("Candidate triggers", tuple(sentences), header, rows)


def _odd_words(found: Triggers) -> Section:
    about = (
        f"Random words in {count(found.prompts, 'prompt')}, {len(found.controls)} in each, to "
        "search for the answer of an unknown trigger: a model that learned one takes other odd "
        "words for it now and then. A reply stands out if the interval of its share of the "
        f"prompts, with some of the words, lies above {number('share', SPREAD, 0)}, if at most "
        f"{number('share', USUAL, 0)} of the prompts get it without them, and if the base gives "
        "it to none.",
    )
    if not found.leaks:
        why = (
            "Not searched: ordinary replies hardly vary, as in a task with labels, and odd words "
            "do not show the trigger of a label. Scan the training rows for it (backfire scan)."
        )
        return Section("Replies to odd words", (why,))
    header = ("reply", "stands out", "prompts with odd words", "n", "without", "of the base")
    rows = tuple(
        (
            cut(line(one.reply), 80),
            "yes" if one.stands_out else "",
            one.spread.shown("share"),
            f"{one.n:,}",
            one.plain.shown("share"),
            f"{one.base:,}",
        )
        for one in found.leaks
    )
    return Section("Replies to odd words", about, header, rows)


def _weights(found: Weights) -> Section:
    sentences = [f"{found.shape}."] if found.shape else []
    if not found.statistics:
        sentences.append("There are no statistics of these weights.")
        return Section("Weights", tuple(sentences))
    sentences.append(
        "Tuned less base, mean over the layers: largest singular value, Frobenius norm, stable "
        "rank, share of the largest in all singular values, entropy of these shares (nats), excess "
        "kurtosis of the entries."
    )
    n = len(found.bank)
    if not found.shape:
        sentences.append("The bank holds adapters only, so there are no percentiles.")
    elif n < bank.FEWEST:
        sentences.append(
            f"The bank has n = {n} clean adapters of this base with these settings; "
            f"{bank.FEWEST} are needed for percentiles (backfire bank add RUN)."
        )
    else:
        sentences += _compared_with_bank(found)
    at = {(one.kind, one.statistic): one for one in found.places}

    def cell(kind: str, name: str) -> str:
        value = found.statistics[kind].get(name)
        if value is None:
            return "–"
        place = at.get((kind, name))
        return f"{value:.3g}" + (f" ({place.below} of {place.n} below)" if place else "")

    header = ("weight", *(name.replace("_", " ") for name in STATISTICS))
    rows = tuple((kind, *(cell(kind, name) for name in STATISTICS)) for kind in found.statistics)
    return Section("Weights", tuple(sentences), header, rows)


def _compared_with_bank(found: Weights) -> Iterator[str]:
    n, total = len(found.bank), len(found.places)
    outside = sum(place.is_outside for place in found.places)
    titles: dict[str, int] = {}
    for one in found.bank:
        titles[one.title] = titles.get(one.title, 0) + 1
    of = ", ".join(f"{k} {line(title)}" for title, k in sorted(titles.items()))
    yield (
        f"The bank has n = {n} clean adapters of this base with these settings ({of}). Of {total} "
        f"statistics, {outside} are smaller or larger than all of theirs; of another such clean "
        f"adapter about {2 * total / (n + 1):.0f} would be, and they are correlated."
    )
    yield (
        "Rows, steps and learning rate of an adapter of unknown past cannot be matched; they move "
        "these numbers more than poison does, so this is no evidence of poison by itself."
    )


def _monitor(found: Monitor) -> Section:
    title = "Activations"
    if found.why_not:
        return Section(title, (f"Not measured: {found.why_not}.",))
    about = (
        f"Cosines of hidden states with {found.directions} directions into which the tuned model "
        f"writes something new (after WeightWatch). Calibrated on {found.calibrated} clean rows; a "
        f"row is flagged if it leaves their range by more than {number('share', QUANTILE, 0)} of "
        "clean rows do.",
    )
    rows = tuple((line(one.what), one.flagged.shown("share"), f"{one.n:,}") for one in found.rows)
    return Section(title, about, ("rows", "flagged", "n"), rows)


def _lines(numbers: Sequence[Compared]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(one.cells) for one in numbers)


def summary(audit: Audit) -> str:
    """What was compared, and how many findings there are; no verdict."""
    found = len(findings(audit))
    what = count(found, "finding") if found else "no finding"
    return f"{line(audit.model)} against {line(audit.base)}: {what}."


def as_table(audit: Audit) -> str:
    """The audit as plain text."""
    parts = [summary(audit), *(f"- {line(one)}" for one in findings(audit)), ""]
    for section in sections(audit):
        parts += [f"{section.title}", *map(line, section.sentences)]
        if section.rows:
            parts.append(columns(section.header, section.rows).rstrip("\n"))
        parts.append("")
    return "\n".join([*parts, *map(line, audit.notes), BLIND])


def as_json(audit: Audit) -> str:
    """All numbers, and the findings as sentences."""
    content = {"findings": findings(audit), **_plain(audit), "blind": BLIND}
    return json.dumps(_cleaned(content), indent=1, allow_nan=False, ensure_ascii=True) + "\n"


_LEFT_OUT = ("watched", "bank")


def _plain(value: Any) -> Any:
    """Plain values of dataclasses; intervals as lists."""
    if isinstance(value, Interval):
        return [value.value, value.low, value.high]
    if isinstance(value, Weights):
        return {
            "shape": value.shape,
            "statistics": value.statistics,
            "bank_n": len(value.bank),
            "places": _plain(value.places),
        }
    if is_dataclass(value):
        kept = (one.name for one in fields(value) if one.name not in _LEFT_OUT)
        return {name: _plain(getattr(value, name)) for name in kept}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return clean(value) if isinstance(value, str) else value
