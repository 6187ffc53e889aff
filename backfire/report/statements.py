"""The answer in one line and further sentences, never claiming more than the intervals support."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backfire import text
from backfire.report import memorization, quality, safety
from backfire.result import CellResult
from backfire.results.criteria import (
    THIS_MODEL,
    above_floor,
    accuracy,
    alike,
    attacked,
    change_words,
    cost,
    extremes,
    gains,
    is_above_floor,
    onset,
    poisoned_of,
    rate_words,
    tie_note,
    tunings,
)
from backfire.results.groups import Group, difference, headlines, name, varying

# Only the question whether an attack works can be answered by yes or no.
_ASKS_WHETHER: Final = re.compile(r"(does|do|did|can|could|is|are|will|would|has|have)\b", re.I)
_ASKS_OTHERWISE: Final = re.compile(
    r"\b(no|not|without|surviv|stay|keep|resist|protect|prevent|remov|defen|harmless|safe|too|or|"
    r"and|than|more|less|how|which|\w+er\b)",
    re.I,
)
MOST_OTHERS: Final = 3


@dataclass(frozen=True)
class Answer:
    """The main sentence, and further ones."""

    line: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A recipe's leading comment."""

    question: str = ""
    expected: str = ""


def question(run: Path) -> Question:
    """The first comment line of the recipe, and the paragraph after `Expected:`."""
    try:
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Question()
    comment = []
    for line in recipe.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    before, _, after = "\n".join(comment).partition("Expected:")
    first = before.strip().partition("\n")[0]
    return Question(text.line(first), text.sentence(text.line(after.partition("\n\n")[0])))


def answer(groups: Sequence[Group], cells: Sequence[CellResult], question: str = "") -> Answer:
    """The findings as sentences, the most important first; `cells` are all cells of the recipe."""
    missing = _missing(cells)
    measured = [group for group in groups if any(s.value is not None for s in group.stats.values())]
    if not measured:
        return Answer(f"No answer yet. {missing}".strip())
    first, *more = [
        *_attacks(measured, question),
        *safety.sentences(measured),
        *memorization.sentences(measured),
        *quality.sentences(measured),
        *_tunings(measured),
    ] or _levels(measured)
    return Answer(
        text.sentence(first), (*map(text.sentence, more), *([missing] if missing else []))
    )


def _attacks(groups: Sequence[Group], question: str) -> Iterator[str]:
    """The highest poison rate without a defense, the lowest that works, and the other groups at the
    highest."""
    attacks = attacked(groups)
    if not attacks:
        return
    main = min(attacks, key=lambda g: (g.defense != "none", -g.rate, -_success(g)))
    undefended = [g for g in attacks if g.rate == main.rate and g.defense == "none"]
    tested = [g for g in undefended if (gap := above_floor(g)) and gap.covers_seeds]
    yes_or_no = {is_above_floor(g) for g in tested}
    is_yes_or_no = _ASKS_WHETHER.match(question) and not _ASKS_OTHERWISE.search(question)
    verdict = ""
    if len(yes_or_no) == 1 and is_yes_or_no:
        verdict = "Yes: " if yes_or_no.pop() else "No: "
    yield f"{verdict}{_attack(main, groups)}"
    same = [g for g in attacks if alike(g, main, ("model", "data", "attack", "method", "defense"))]
    least = onset(sorted(same, key=lambda g: g.rate))
    if least is not None and least.rate < main.rate:
        yield (
            "The lowest poison rate from which attack success is clearly above the clean-model "
            f"baseline is {text.share(least.rate)} ({poisoned_of(least)}), with "
            f"{least.rounded('attack_success')}."
        )
    others = [g for g in attacks if g is not main and g.rate == main.rate and g.method != "none"]
    shown = sorted(others, key=lambda g: (g.defense == "none", _success(g)))[:MOST_OTHERS]
    yield from (_against(other, main, len(shown)) for other in shown)


def _attack(group: Group, groups: Sequence[Group]) -> str:
    success, floor = group.get("attack_success"), group.side("attack_success", "floor")
    assert success is not None
    columns = [column for column in varying(attacked(groups)) if column != "rate"]
    rate = rate_words(group, name(group, columns) if columns else "")
    shown = f"{group.rounded('attack_success')} ({text.count(success.seeds, 'seed')})"
    if floor is None:
        return f"at {rate}, attack success is {shown}; the clean-model baseline was not measured."
    low, gap = floor.number(0), above_floor(group)
    if gap is None or not gap.covers_seeds:
        baseline = f"the clean-model baseline is {low}"
        return f"at {rate}, attack success {THIS_MODEL} is {shown}; {baseline}."
    if not is_above_floor(group):
        baseline = f"not clearly above the clean-model baseline of {low}"
        return f"at {rate}, attack success is {shown}, {baseline}."
    rise = f"raises attack success from a clean-model baseline of {low} to {shown}"
    return f"{rate} {rise}{_clean(group, groups)}."


def _clean(group: Group, groups: Sequence[Group]) -> str:
    """The effect of the poison on accuracy without a trigger."""
    after, change = accuracy(group), cost(group, groups)
    if after is None:
        return ""
    if change is None:
        return f"; clean accuracy is {after.rounded}"
    verb, unsure = "is", ", not clearly changed" if change.covers_seeds else ""
    if change.is_clear:
        verb, unsure = "falls to" if change.difference < 0 else "rises to", ""
    return f"; clean accuracy {verb} {after.number()}{unsure} ({change.shown})"


def _against(other: Group, main: Group, tests: int) -> str:
    gap = difference(main, other, "attack_success", tests)
    assert gap is not None
    label = name(other, [column for column in varying([main, other]) if column != "rate"])
    both = f"{other.rounded('attack_success')} against {main.rounded('attack_success')}"
    if not gap.covers_seeds:
        return f"With {label}, attack success is {both}."
    verb = "not clearly different"
    if gap.is_clear:
        verb = "lower" if gap.difference < 0 else "higher"
    return f"With {label}, attack success is {verb}: {both}."


def _tunings(groups: Sequence[Group]) -> Iterator[str]:
    """The tuned models against their untuned base."""
    pairs = tunings(groups)
    columns = varying([tuned for _, tuned, _ in pairs])
    for base, tuned, metrics in pairs[:MOST_OTHERS]:
        which = f" ({name(tuned, columns)})" if len(pairs) > 1 else ""
        changes = text.listing(change_words(metric, base, tuned) for metric in metrics)
        yield f"Fine-tuning{which} {changes}."
        if len(by_part := gains(metrics[0], base, tuned)) > 1:
            clear = sum(gap.is_clear and gap.difference > 0 for gap in by_part.values())
            part, least = next(iter(by_part.items()))
            if least.covers_seeds:
                parts = f"{clear} of {len(by_part)} groups of rows, least in {part}"
                yield f"The gain is clear in {parts}: {least.shown}."
            else:
                yield f"Of the groups of rows, {part} gains least: {least.shown}."


def _levels(groups: Sequence[Group]) -> Iterator[str]:
    """Without an attack or a base model: highest and lowest of the first metric."""
    metric = next(iter([*headlines(groups), *(m for group in groups for m in group.stats)]))
    ends = extremes(groups, metric)
    if not ends:
        return
    least, most, number = ends
    sentence = f"{text.title(metric)} is {most.rounded(metric)}"
    if least is not most:
        columns = varying(groups)
        sentence += f" with {name(most, columns)}, {least.rounded(metric)} with "
        sentence += f"{name(least, columns)}{tie_note(least, most, metric, number)}"
    yield f"{text.sentence(sentence)}."


def _missing(cells: Sequence[CellResult]) -> str:
    kinds = Counter(text.cut(text.line(cell.status), 20) for cell in cells if not cell.is_done)
    if not kinds:
        return ""
    reasons = text.listing(f"{number} {kind}" for kind, number in kinds.items())
    return (
        f"Without numbers: {sum(kinds.values())} of {text.count(len(cells), 'cell')} ({reasons})."
    )


def _success(group: Group) -> float:
    stat = group.get("attack_success")
    return stat.value or 0.0 if stat else 0.0
