"""The answer in one line, computed from the numbers: never more than their intervals show."""

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
    cost,
    dose,
    gains,
    is_above_floor,
    moved,
    onset,
    told_apart,
    tunings,
)
from backfire.results.groups import Group, difference, headlines, name, varying

# Only a question that asks whether an attack takes hold can be answered by yes or no.
_ASKS_WHETHER: Final = re.compile(r"(does|do|did|can|could|is|are|will|would|has|have)\b", re.I)
_ASKS_OTHERWISE: Final = re.compile(
    r"\b(no|not|without|surviv|stay|keep|resist|protect|prevent|remov|defen|harmless|safe|too|or|"
    r"and|than|more|less|how|which|\w+er\b)",
    re.I,
)
MOST_BESIDE: Final = 3


@dataclass(frozen=True)
class Answer:
    """One line, and what else is worth a sentence."""

    line: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a recipe's leading comment says."""

    question: str = ""
    expected: str = ""


def question(run: Path) -> Question:
    """The first comment line of the recipe, and what follows `Expected:`."""
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
    asked = before.strip().partition("\n")[0]
    return Question(text.line(asked), text.sentence(text.line(after.partition("\n\n")[0])))


def answer(groups: Sequence[Group], cells: Sequence[CellResult], asked: str = "") -> Answer:
    """What these numbers say, most telling first; `cells` are all that were meant to be run."""
    missing = _missing(cells)
    known = [group for group in groups if any(s.value is not None for s in group.stats.values())]
    if not known:
        return Answer(f"No answer yet. {missing}".strip())
    said = [*_attacks(known, asked), *safety.sentences(known)]
    said += [*memorization.sentences(known), *quality.sentences(known)]
    said = [*said, *_tunings(known)] or list(_levels(known))
    return Answer(text.sentence(said[0]), (*said[1:], *([missing] if missing else [])))


def _attacks(groups: Sequence[Group], asked: str) -> Iterator[str]:
    """The strongest dose without a defense, the least that worked, and the others at that dose."""
    found = attacked(groups)
    if not found:
        return
    main = min(found, key=lambda g: (g.defense != "none", -g.rate, -_success(g)))
    undefended = [g for g in found if g.rate == main.rate and g.defense == "none"]
    told = [g for g in undefended if (gap := above_floor(g)) and gap.is_known]
    yes_or_no = {is_above_floor(g) for g in told}
    verdict = ""
    if len(yes_or_no) == 1 and _ASKS_WHETHER.match(asked) and not _ASKS_OTHERWISE.search(asked):
        verdict = "Yes: " if yes_or_no.pop() else "No: "
    yield f"{verdict}{_attack(main, groups)}"
    same = [g for g in found if alike(g, main, ("model", "data", "attack", "method", "defense"))]
    least = onset(sorted(same, key=lambda g: g.rate))
    if least is not None and least.rate < main.rate:
        said = f"{dose(least)}: {least.said('attack_success')}"
        yield f"The lowest dose from which all are clearly above the floor is {said}."
    others = [g for g in found if g is not main and g.rate == main.rate and g.method != "none"]
    shown = sorted(others, key=lambda g: (g.defense == "none", _success(g)))[:MOST_BESIDE]
    yield from (_beside(other, main, len(shown)) for other in shown)


def _attack(group: Group, groups: Sequence[Group]) -> str:
    success, floor = group.get("attack_success"), group.side("attack_success", "floor")
    assert success is not None
    columns = [column for column in varying(attacked(groups)) if column != "rate"]
    rows = dose(group, name(group, columns) if columns else "")
    shown = f"{group.said('attack_success')} ({text.count(success.seeds, 'seed')})"
    if floor is None:
        return f"with {rows} attack success is {shown}; no clean model's floor stands beside it."
    low, gap = floor.number(0), above_floor(group)
    if gap is None or not gap.is_known:
        return f"with {rows} attack success {THIS_MODEL} is {shown}, where its floor is {low}."
    if not is_above_floor(group):
        return f"{rows} leave attack success at {shown}, not clearly above its floor of {low}."
    return f"{rows} lift attack success from a floor of {low} to {shown}{_clean(group, groups)}."


def _clean(group: Group, groups: Sequence[Group]) -> str:
    """What the poison does to the answers without a trigger."""
    after, change = accuracy(group), cost(group, groups)
    if after is None:
        return ""
    if change is None:
        return f"; clean accuracy is {after.said}"
    verb, unsure = "is", ", not clearly changed" if change.is_known else ""
    if change.is_clear:
        verb, unsure = "falls to" if change.difference < 0 else "rises to", ""
    return f" while clean accuracy {verb} {after.number()}{unsure} ({change.said})"


def _beside(other: Group, main: Group, tests: int) -> str:
    gap = difference(main, other, "attack_success", tests)
    assert gap is not None
    label = name(other, [column for column in varying([main, other]) if column != "rate"])
    both = f"{other.said('attack_success')} against {main.said('attack_success')}"
    if not gap.is_known:
        return f"With {label}, attack success is {both}."
    verb = "not clearly different"
    if gap.is_clear:
        verb = "lower" if gap.difference < 0 else "higher"
    return f"With {label}, attack success is {verb}: {both}."


def _tunings(groups: Sequence[Group]) -> Iterator[str]:
    """The untuned model against the tuned ones."""
    pairs = tunings(groups)
    columns = varying([tuned for _, tuned, _ in pairs])
    for base, tuned, metrics in pairs[:MOST_BESIDE]:
        which = f" ({name(tuned, columns)})" if len(pairs) > 1 else ""
        said = text.listing(moved(metric, base, tuned) for metric in metrics)
        yield f"Fine-tuning{which} {said}."
        if len(by_part := gains(metrics[0], base, tuned)) > 1:
            clear = sum(gap.is_clear and gap.difference > 0 for gap in by_part.values())
            part, least = next(iter(by_part.items()))
            if least.is_known:
                parts = f"{clear} of {len(by_part)} groups of rows, least in {part}"
                yield f"The gain is clear in {parts}: {least.said}."
            else:
                yield f"Of the groups of rows, {part} gains least: {least.said}."


def _levels(groups: Sequence[Group]) -> Iterator[str]:
    """Neither attack nor base: the best and the worst of the first metric."""
    metric = next(iter([*headlines(groups), *(m for group in groups for m in group.stats)]))
    known = [(stat.value or 0.0, g) for g in groups if (stat := g.get(metric))]
    if not known:
        return
    (_, least), (_, most) = (pick(known, key=lambda pair: pair[0]) for pick in (min, max))
    sentence = f"{text.title(metric)} is {most.said(metric)}"
    if least is not most:
        columns = varying(groups)
        rest = f"{least.said(metric)} with {name(least, columns)}"
        sentence += (
            f" with {name(most, columns)}, {rest}{told_apart(least, most, metric, len(known))}"
        )
    yield f"{text.sentence(sentence)}."


def _missing(cells: Sequence[CellResult]) -> str:
    kinds = Counter(text.cut(text.line(cell.status), 20) for cell in cells if not cell.is_done)
    if not kinds:
        return ""
    said = text.listing(f"{number} {kind}" for kind, number in kinds.items())
    return f"{sum(kinds.values())} of {text.count(len(cells), 'cell')} gave no numbers ({said})."


def _success(group: Group) -> float:
    stat = group.get("attack_success")
    return stat.value or 0.0 if stat else 0.0
