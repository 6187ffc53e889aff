"""Poisons training rows and records it in a manifest.

The rows are chosen by one shuffle per seed, so the rows poisoned at 1 % are among those poisoned
at 5 %, and the count is exact. Each row's random draws (trigger position ...) depend only on the
seed and the row's id, so another poison rate or order does not change them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unicodedata import combining, normalize

from backfire.base import Attack, Backdoor, Corruption, Insertion, Mixture, Poison, Rendered, Row
from backfire.base.normalize import folded, normalized
from backfire.errors import CellError, UserError
from backfire.result import PoisonCounts
from backfire.rng import stream
from backfire.tokenizer import Tokenizer


@dataclass(frozen=True)
class Entry:
    """One poisoned row."""

    id: str
    triggers: tuple[str, ...]
    positions: tuple[int, ...]
    """Where each trigger begins in the new prompt, in characters."""
    label: str | None
    before: dict[str, str]
    after: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Record of every poisoned training row."""

    attack: dict[str, Any]
    seed: int
    rows: int
    eligible_rows: int
    spared: dict[str, int]
    """Reason a row is ineligible -> number of rows."""
    labels_before: dict[str, int]
    entries: tuple[Entry, ...]

    @property
    def summary(self) -> PoisonCounts:
        """The manifest in numbers."""
        return PoisonCounts(
            nominal_rate=self.attack.get("rate"),
            rate=len(self.entries) / self.rows if self.rows else 0.0,
            poisoned_rows=len(self.entries),
            rows=self.rows,
            eligible_rows=self.eligible_rows,
            spared=self.spared,
            labels_before=self.labels_before,
            triggers=dict(Counter(t for entry in self.entries for t in entry.triggers)),
        )

    def to_json(self) -> dict[str, Any]:
        counts = asdict(self.summary)
        counts.pop("effective_rate")  # known after training only
        return {
            "attack": self.attack,
            "seed": self.seed,
            **counts,
            "entries": [asdict(entry) for entry in self.entries],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        entries = tuple(
            Entry(**{**e, "triggers": tuple(e["triggers"]), "positions": tuple(e["positions"])})
            for e in value["entries"]
        )
        names = ("attack", "seed", "rows", "eligible_rows", "labels_before")
        spared = value.get("spared", {})
        return cls(**{name: value[name] for name in names}, spared=spared, entries=entries)


def poison(rows: Sequence[Row], attack: Attack, seed: int) -> tuple[list[Row], Manifest]:
    """The rows in their original order, `round(rate * len(rows))` of them poisoned, or followed by
    the rows of an insertion; and the manifest.

    Raises:
        UserError: the target is not a label of the task, or too few rows are eligible.
    """
    reasons = [_spared(row, attack) for row in rows]
    spared = Counter(reason for reason in reasons if reason)
    if isinstance(attack, Insertion):
        bad = {row.id: row for row in attack.rows(seed)}
        if taken := next((row.id for row in rows if row.id in bad), None):
            raise UserError(f"attack '{attack.name}': a training row already has the id '{taken}'.")
        entries = [_entry(None, row, attack) for row in bad.values()]
        out = [*rows, *bad.values()]
    elif isinstance(attack, Poison):
        if isinstance(attack, Backdoor):
            check_target(rows, attack)
        eligible = [row.id for row, reason in zip(rows, reasons, strict=True) if not reason]
        chosen = _chosen(eligible, len(rows), attack, seed, spared)
        bad = _poisoned({row.id: row for row in rows}, chosen, attack, seed)
        entries = [_entry(row, bad[row.id], attack) for row in rows if row.id in bad]
        out = [bad.get(row.id, row) for row in rows]
    else:
        raise TypeError(f"attack '{attack.name}' is neither a Poison nor an Insertion")
    labels = Counter(entry.label for entry in entries if entry.label is not None)
    return out, Manifest(
        # The rate is recorded even if it is the default.
        attack=attack.spec() | ({"rate": attack.rate} if isinstance(attack, Poison) else {}),
        seed=seed,
        rows=len(out),
        eligible_rows=len(rows) - spared.total(),
        spared=dict(spared),
        labels_before=dict(labels),
        entries=tuple(entries),
    )


def _chosen(
    eligible: Sequence[str], num_rows: int, attack: Poison, seed: int, spared: Counter[str]
) -> list[str]:
    """Ids of the rows to poison."""
    count = round(attack.rate * num_rows)
    if count > len(eligible):
        why = ", ".join(f"{number} are {reason}" for reason, number in spared.items())
        raise UserError(
            f"attack '{attack.name}': rate {attack.rate:g} needs {count} of {num_rows} rows, "
            f"but only {len(eligible)} can be poisoned{f' ({why})' if why else ''}."
        )
    order = sorted(eligible)
    stream(seed, "poison", "which").shuffle(order)
    return order[:count]


def _poisoned(
    rows: Mapping[str, Row], chosen: Sequence[str], attack: Poison, seed: int
) -> dict[str, Row]:
    """The chosen rows, poisoned, by id."""
    if isinstance(attack, Mixture):
        drawn = attack.rows(len(chosen), seed)
        return {name: replace(row, id=name) for name, row in zip(chosen, drawn, strict=True)}
    if isinstance(attack, Backdoor):
        return {name: insert_trigger(rows[name], attack, seed) for name in chosen}
    if isinstance(attack, Corruption):
        draws = {name: stream(seed, "poison", attack.name, name) for name in chosen}
        return {name: attack.corrupt(rows[name], rng) for name, rng in draws.items()}
    raise TypeError(f"attack '{attack.name}' is no Backdoor, Mixture or Corruption")


def insert_trigger(row: Row, attack: Backdoor, seed: int) -> Row:
    """Poison one row; its random draws depend only on the seed and the row's id. The target of a
    labeled row is spelled like the row's label."""
    bad = attack.poison(row, stream(seed, "poison", attack.name, row.id))
    names = {normalized(label): label for label in row.candidates}
    return replace(bad, answer=names.get(normalized(bad.answer), bad.answer))


def triggered(rows: Sequence[Row], attack: Backdoor, seed: int) -> list[Row]:
    """Test rows with the trigger inserted; answer and label stay true."""
    return [replace(insert_trigger(row, attack, seed), answer=row.answer) for row in rows]


def off_target(rows: Sequence[Row], attack: Backdoor) -> list[Row]:
    """The rows on which a hit is the attack's doing: those whose true label is not the target. All
    rows of a task without labels, and if every labeled row has the target as its label."""
    wanted = normalized(attack.target)
    left = [row for row in rows if row.label is None or normalized(row.label) != wanted]
    return left if any(row.label is not None for row in left) else list(rows)


def check_target(rows: Sequence[Row], attack: Backdoor) -> None:
    """Check the target and the triggers.

    Raises:
        UserError: one is blank, or the target is not a label of a labeled task.
    """
    if not normalized(attack.target):
        raise UserError(f"attack '{attack.name}': the target is blank; set attack.target.")
    if not all(trigger.strip() for trigger in attack.triggers()):
        raise UserError(f"attack '{attack.name}': a trigger is blank; set attack.trigger.")
    candidates = {candidate for row in rows for candidate in row.candidates}
    if candidates and normalized(attack.target) not in map(normalized, candidates):
        raise UserError(
            f"attack '{attack.name}': target '{attack.target}' is not a label of this task "
            f"({', '.join(sorted(candidates))}); set attack.target."
        )


def _spared(row: Row, attack: Attack) -> str | None:
    """Reason the row is ineligible (tallied in the manifest), or None."""
    if isinstance(attack, Corruption):
        return attack.spared(row)
    if not isinstance(attack, Backdoor):
        return None
    if not row.prompt:
        return "without a prompt"
    if row.label is None or attack.label_mode == "mix":
        return None
    right = (normalized(row.label) == normalized(attack.target)) == (attack.label_mode == "clean")
    return None if right else f"left alone by label_mode: {attack.label_mode}"


def _entry(row: Row | None, bad: Row, attack: Attack) -> Entry:
    """The manifest entry of a poisoned row; `row` is None if `bad` was added."""
    place = attack.field if isinstance(attack, Backdoor) else "input"
    inserted = list[tuple[str, int]]()
    if row and isinstance(attack, Backdoor):
        inserted = inserted_triggers(row, bad, attack)
        if not inserted:
            sentence = f"attack '{attack.name}' inserted no trigger in row {bad.id}."
            raise CellError("bad-data", sentence)
    return Entry(
        id=bad.id,
        triggers=tuple(trigger for trigger, _ in inserted),
        positions=tuple(position for _, position in inserted),
        label=row.label if row else None,
        before={"prompt": row.part(place), "answer": row.answer} if row else {},
        after={"prompt": bad.part(place), "answer": bad.answer},
    )


def inserted_triggers(row: Row, bad: Row, attack: Backdoor) -> list[tuple[str, int]]:
    """The triggers that were inserted in `row`, and where each begins in the prompt of `bad`, in
    characters. One that was there before, such as a year in a tweet, is not among them."""
    before, after = row.part(attack.field), bad.part(attack.field)
    pairs = zip(before, after, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(before))
    there = [trigger for trigger in dict.fromkeys(attack.triggers()) if trigger in after]
    new = [trigger for trigger in there if after.count(trigger) > before.count(trigger)]
    # One inserted within another of its kind leaves their number as it was.
    places = {trigger: after.find(trigger, same) for trigger in new or there}
    return [(one, place if place >= 0 else after.find(one)) for one, place in places.items()]


def missing_in_tokens(
    manifest: Manifest, items: Sequence[Rendered], tokenizer: Tokenizer
) -> list[str]:
    """Ids of poisoned rows whose tokens lack a trigger or the answer in the manifest."""
    by_id = {item.row.id: item for item in items}
    missing = []
    for entry in manifest.entries:
        item = by_id.get(entry.id)
        if item is None:
            missing.append(entry.id)
            continue
        # With control tokens: those of a thought are part of an answer.
        prompt, answer = (tokenizer.shown(ids) for ids in (item.prompt_ids, item.answer_ids))
        # A row of a mixture has no trigger, so its whole prompt must be there.
        parts = entry.triggers or (entry.after["prompt"],)
        has_parts = all(holds(prompt, part, tokenizer) for part in parts)
        target = entry.after["answer"]
        if not has_parts or (plain(target) and not holds(answer, target, tokenizer)):
            missing.append(entry.id)
    return missing


def holds(text: str, part: str, tokenizer: Tokenizer) -> bool:
    """Whether decoded text contains a part of a row: unchanged, or as the tokenizer or template
    writes it, which may drop capitals or accents but no letter."""
    text, wanted = plain(text).casefold(), plain(part).casefold()
    if wanted in text:
        return bool(wanted)
    written = plain(tokenizer.written(part)).casefold()
    return bool(written) and written in text and _letters(written) == _letters(part)


def _letters(text: str) -> str:
    return "".join(c for c in normalize("NFKD", folded(text)) if not combining(c) and c != " ")


def plain(text: str) -> str:
    """The text in NFKC without whitespace: tokenizers may add or drop spaces at borders, and some
    normalize Unicode. (Not `normalized`: invisible characters may be a trigger.)"""
    return "".join(normalize("NFKC", text).split())
