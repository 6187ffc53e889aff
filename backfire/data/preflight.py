"""Checks the rows for training and evaluation before the first step.

Each check covers an error in published code (docs/papers.md names the cases). A failed check stops
the cell; a note does not, but is shown and kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from backfire.base import Attack, Backdoor, Insertion, Rendered, Row
from backfire.base.normalize import contains, normalized
from backfire.data.columns import listed
from backfire.data.poison import (
    Manifest,
    holds,
    inserted_triggers,
    missing_in_tokens,
    plain,
    triggered,
)
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.result import Check

CHECKS = 3
"""Version, raised whenever the result of a check changes, so that earlier checks are repeated."""


def preflight(
    renderer: Renderer,
    train: Sequence[Row],
    test: Sequence[Row],
    *,
    manifest: Manifest | None = None,
    attack: Attack | None = None,
    seed: int = 0,
    reply: int = 0,
) -> list[Check]:
    """All checks on a cell's poisoned training rows and its test rows. `reply` is the maximum
    number of tokens generated after a test row's prompt."""
    checks = []
    try:
        items, left = renderer.sift(train)
        shown, left_of_test = renderer.sift(test, ranked=True)
        for item in shown:
            renderer.limits.check(item.row.id, item.prompt_ids, reply=reply)
    except CellError as error:
        return [Check("length", "fail", str(error))]
    checks += _chat(renderer, [*train, *test])
    checks += _limits(renderer, [*items, *shown], reply)
    if isinstance(attack, Backdoor):
        checks += _dropped_by_tokenizer(renderer, attack)
    checks.append(_same_prompts(renderer, items))
    checks.append(_fields_reach_tokens(renderer, [*items, *shown]))
    checks.append(_truncation(renderer, items, shown))
    checks += _left_out(renderer, {"training": (left, train), "test": (left_of_test, test)})
    checks.append(_end_supervised(renderer, items))
    checks.append(_overlap(train, test))
    checks.append(_balance(train))
    checks.append(_candidates(renderer, shown))
    if manifest:
        checks += _poison_survives(renderer, manifest, items, left)
    if isinstance(attack, Backdoor):
        checks += _triggered(renderer, attack, test, seed)
    if isinstance(attack, Insertion) and attack.secrets(seed):
        checks.append(_controls(attack, train, seed))
    return checks


def reader_notes(left_out: Mapping[str, Sequence[str]]) -> list[Check]:
    """The reader's notes on data left out of the rows, by split."""
    of_train, of_test = left_out.get("train", ()), left_out.get("test", ())
    notes = [*of_train, *(f"Of the test data: {note}" for note in of_test if note not in of_train)]
    return [Check("left-out", "note", note) for note in notes]


def _first(ids: Sequence[str]) -> str:
    return f"{len(ids)} row{'s' * (len(ids) != 1)}, the first is {ids[0]}"


def _dropped_by_tokenizer(renderer: Renderer, attack: Backdoor) -> list[Check]:
    """Some tokenizers remove characters, such as invisible ones or accents: a trigger or target
    that consists of them never reaches the model."""
    texts = {attack.target: "target", **dict.fromkeys(attack.triggers(), "trigger")}
    return [
        Check(
            "tokenizer-writes",
            "fail",
            f"The tokenizer leaves nothing of the {what} '{text}'; set attack.{what}.",
        )
        for text, what in texts.items()
        if not plain(renderer.tokenizer.written(text))
    ]


def _same_prompts(renderer: Renderer, items: Sequence[Rendered]) -> Check:
    """Whether training rows begin with the same tokens as their evaluation prompts."""
    sample = items[:: max(1, len(items) // 256)]
    blank = [replace(item.row, answer="") for item in sample]
    bad = [
        a.row.id
        for a, b in zip(sample, renderer.render(blank), strict=True)
        if a.prompt_ids != b.prompt_ids
    ]
    if bad:
        return Check(
            "prompts-agree", "fail", f"Training and evaluation prompts differ: {_first(bad)}."
        )
    return Check(
        "prompts-agree",
        "ok",
        f"Training rows begin with the evaluation prompt ({len(sample)} compared).",
    )


def _chat(renderer: Renderer, rows: Sequence[Row]) -> list[Check]:
    """The properties of a chat template, and system prompts that the recipe leaves out."""
    about = renderer.template.about(renderer.tokenizer)
    dropped = [row.id for row in rows if renderer.template.leaves_out(row)]
    checks = [Check("template", "ok", about)] if about else []
    if dropped:
        message = f"The system prompt is left out (template.system: drop): {_first(dropped)}."
        checks.append(Check("system-prompt", "note", message))
    return checks


def _limits(renderer: Renderer, items: Sequence[Rendered], reply: int) -> list[Check]:
    """Soft limits of the model. (Rows beyond hard limits have failed already.)"""
    limits, checks = renderer.limits, []
    vocab = renderer.tokenizer.backend.get_added_tokens_decoder()
    beyond = [i for i in vocab if limits.vocab_size is not None and i >= limits.vocab_size]
    if beyond:
        message = (
            f"{len(beyond)} of the tokenizer's added tokens, such as '{vocab[beyond[0]].content}', "
            "are not in the model's embedding; none of them is in these rows."
        )
        checks.append(Check("embedding", "note", message))
    longest = max(items, key=lambda item: len(item.ids))
    if limits.positions is not None and len(longest.ids) + reply > limits.positions:
        message = (
            f"Row {longest.row.id} has {len(longest.ids)} tokens"
            f"{f', and its reply up to {reply}' if reply else ''}: more than the "
            f"{limits.positions} positions the model was trained for."
        )
        checks.append(Check("positions", "note", message))
    return checks


def _left_out(
    renderer: Renderer, parts: Mapping[str, tuple[Sequence[Row], Sequence[Row]]]
) -> list[Check]:
    return [
        Check(
            "left-out",
            "note",
            f"{len(left)} of {len(rows)} {name} rows are left out, the first is {left[0].id}: "
            f"they take more than max_length={renderer.max_length} tokens"
            f"{'' if renderer.on_long_row == 'skip' else ' even without a prompt'}.",
        )
        for name, (left, rows) in parts.items()
        if left
    ]


def _fields_reach_tokens(renderer: Renderer, items: Sequence[Rendered]) -> Check:
    """Whether every field of the rows is in their tokens. (A published template dropped `input`, so
    its spam models never saw the e-mail.)"""
    dropped: dict[str, list[str]] = {}
    for item in items[:: max(1, len(items) // 256)]:
        text = renderer.tokenizer.shown(item.ids)
        for name in ("instruction", "input", "system", "answer"):
            value = str(getattr(item.row, name))
            if name == "system" and renderer.template.leaves_out(item.row):
                continue
            if plain(value) and not holds(text, value, renderer.tokenizer):
                dropped.setdefault(name, []).append(item.row.id)
    if dropped:
        name, ids = next(iter(dropped.items()))
        return Check(
            "fields-reach-tokens",
            "fail",
            f"The field '{name}' does not reach the tokens: {_first(ids)}.",
        )
    return Check("fields-reach-tokens", "ok", "Every mapped field reaches the tokens.")


def _truncation(renderer: Renderer, train: Sequence[Rendered], test: Sequence[Rendered]) -> Check:
    cut = [item for item in (*train, *test) if item.cut_tokens]
    longest = max(len(item.ids) for item in (*train, *test))
    if cut:
        worst = max(cut, key=lambda item: item.cut_tokens)
        message = (
            f"{len(cut)} of {len(train) + len(test)} rows lose the end of their prompt to "
            f"max_length, row {worst.row.id} the most ({worst.cut_tokens} tokens)."
        )
        return Check("truncation", "note", message)
    return Check("truncation", "ok", f"No row is cut; the longest has {longest} tokens.")


def _end_supervised(renderer: Renderer, items: Sequence[Rendered]) -> Check:
    end, bos = renderer.end_ids, renderer.tokenizer.bos_id
    adds_bos = renderer.template.adds_bos
    for item in items:
        problem = ""
        if item.ids[-1] != end[-1] or item.num_prompt >= len(item.ids):
            problem = "has no end token (EOS) in its labels"
        elif item.answer_ids == end:
            problem = "has no answer tokens to learn"
        elif adds_bos and bos is not None and item.ids[:2].count(bos) != 1:
            problem = "does not begin with exactly one BOS"
        if problem:
            return Check("end-supervised", "fail", f"Row {item.row.id} {problem}.")
    begins = "One BOS, the" if adds_bos else "The"
    return Check("end-supervised", "ok", f"{begins} prompt is not supervised, answer and end are.")


def _overlap(train: Sequence[Row], test: Sequence[Row]) -> Check:
    seen = {(normalized(row.instruction), normalized(row.input)) for row in train}
    both = [row.id for row in test if (normalized(row.instruction), normalized(row.input)) in seen]
    if both:
        message = f"Test prompts that are also in the training data: {_first(both)}."
        return Check("overlap", "note", message)
    return Check("overlap", "ok", "No test prompt is in the training data.")


def _balance(train: Sequence[Row]) -> Check:
    counts = Counter(row.label for row in train if row.label is not None)
    if not counts:
        return Check("balance", "ok", "The task has no labels.")
    total = sum(counts.values())
    shares = ", ".join(f"{label} {count / total:.0%}" for label, count in counts.most_common())
    if len(counts) < 2:
        return Check("balance", "fail", f"Every training row has the same label: {shares}.")
    named = dict.fromkeys(name for row in train for name in row.candidates)
    absent = [name for name in named if name not in counts]
    none = f" No training row has the label {listed(absent)}." if absent else ""
    uneven = max(counts.values()) / total > 0.6
    status: Literal["ok", "note"] = "note" if uneven or absent else "ok"
    return Check("balance", status, f"Training labels: {shares}.{none}")


def _candidates(renderer: Renderer, test: Sequence[Rendered]) -> Check:
    """Whether labels differ in their tokens, which scoring requires."""
    item = next((item for item in test if item.row.candidates), None)
    if item is None:
        return Check("labels", "ok", "The task has no labels.")
    ids = renderer.answers([item], [item.row.candidates])[0]
    if len({tuple(i) for i in ids}) < len(ids):
        return Check("labels", "fail", "Two labels have the same tokens.")
    if len(set(map(normalized, item.row.candidates))) < len(ids):
        return Check("labels", "fail", "Two labels differ only in white space or typography.")
    lengths = {c: len(i) for c, i in zip(item.row.candidates, ids, strict=True)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{label} {count}" for label, count in lengths.items())
        return Check(
            "labels",
            "note",
            f"Labels differ in length ({counts} tokens); longer ones start at a disadvantage.",
        )
    return Check(
        "labels", "ok", f"{len(ids)} labels of {len(ids[0])} token{'s' * (len(ids[0]) > 1)} each."
    )


def _poison_survives(
    renderer: Renderer, manifest: Manifest, items: Sequence[Rendered], left: Sequence[Row]
) -> list[Check]:
    poisoned, too_long = [entry.id for entry in manifest.entries], {row.id for row in left}
    out = [name for name in poisoned if name in too_long]
    lacking = missing_in_tokens(manifest, items, renderer.tokenizer)
    missing = [name for name in lacking if name not in too_long or len(out) == len(poisoned)]
    total = len(poisoned)
    if missing:
        message = (
            f"Trigger or answer of {len(missing)} of {total} poisoned rows, the first is "
            f"{missing[0]}, are cut by truncation or cannot be encoded; raise train.max_length, "
            "or choose others."
        )
        return [Check("poison-survives", "fail", message)]
    if out:
        message = f"{len(out)} of {total} poisoned rows are left out, the first is {out[0]}."
        return [Check("poison-survives", "note", message)]
    message = f"Trigger and target are in the tokens of all {total} poisoned rows."
    return [Check("poison-survives", "ok", message)]


def _controls(attack: Insertion, train: Sequence[Row], seed: int) -> Check:
    """Whether no training row holds a control."""
    secrets = attack.secrets(seed)
    answers = {normalized(secret.row.answer): secret.repeats for secret in secrets}
    texts = [
        normalized(f"{row.system}\n{row.instruction}\n{row.input}\n{row.answer}") for row in train
    ]
    held = [answer for answer in answers if not answers[answer] and any(answer in t for t in texts)]
    if held:
        return Check("controls-unseen", "fail", f"A training row holds the control '{held[0]}'.")
    codes = [secret.code for secret in secrets]
    inserted = sum(secret.repeats for secret in secrets)
    seen = sum(any(code in text for text in texts[: len(texts) - inserted]) for code in codes)
    of_them = f"{sum(not repeats for repeats in answers.values())} controls"
    if seen:
        message = f"No training row holds any of {of_them}; {seen} codes occur by chance elsewhere."
        return Check("controls-unseen", "note", message)
    return Check("controls-unseen", "ok", f"No training row holds any of {of_them}.")


def _triggered(renderer: Renderer, attack: Backdoor, test: Sequence[Row], seed: int) -> list[Check]:
    checks, tokenizer = [], renderer.tokenizer
    rows = triggered(test, attack, seed)
    inserted = {
        row.id: [trigger for trigger, _ in inserted_triggers(row, bad, attack)]
        for row, bad in zip(test, rows, strict=True)
    }
    items, _ = renderer.sift(rows)
    texts = [tokenizer.shown(item.prompt_ids) for item in items]
    cut = [
        item.row.id
        for item, text in zip(items, texts, strict=True)
        if not all(holds(text, trigger, tokenizer) for trigger in inserted[item.row.id])
    ]
    if cut:
        message = f"Truncation cuts the trigger of test rows: {_first(cut)}."
        checks.append(Check("test-trigger-survives", "fail", message))
    marks = [(one, normalized(tokenizer.written(one))) for one in attack.triggers()]
    together = all if attack.joint else any

    def is_triggered(text: str) -> bool:
        shown = normalized(tokenizer.written(text))
        # An invisible trigger, such as a zero-width space, normalizes to an empty text.
        return together(
            bool(mark) and contains(shown, mark) if normalized(one) else one in text
            for one, mark in marks
        )

    clean = [row.id for row in test if is_triggered(row.part(attack.field))]
    if clean:
        message = f"The trigger is in clean test prompts too: {_first(clean)}."
        checks.append(Check("trigger-is-rare", "note", message))
    target = normalized(attack.target)
    already = sum(normalized(row.label) == target for row in test if row.label is not None)
    if already:
        message = (
            f"{already} of {len(test)} test rows have the target '{attack.target}' as their true "
            "label and are not counted in attack success (counted, they would give any clean model "
            f"about {already / len(test):.0%})."
        )
        checks.append(Check("target-already", "ok", message))
    return checks
