"""Looks at what will be trained on and evaluated before a single step is spent.

Each check is here because published code got it wrong (docs/papers.md names the cases). A failed
check stops the cell; a note does not, but is shown and kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from backfire.base import Attack, Backdoor, Insertion, Rendered, Row
from backfire.base.normalize import agreed, contains
from backfire.data.columns import listed
from backfire.data.poison import Manifest, holds, lost, plain, triggered
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.result import Check

CHECKS = 3
"""Raised whenever a check passes other rows or says another thing, so that checks kept from before
are made anew."""


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
    """All checks on one cell's rows, poisoned as they will be trained on. `reply` is how many new
    tokens a test row's prompt may be followed by."""
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
        checks += _left_by_tokenizer(renderer, attack)
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


def told(left_out: Mapping[str, Sequence[str]]) -> list[Check]:
    """What of the data is in no row, by split, as its reader tells it."""
    of_train, of_test = left_out.get("train", ()), left_out.get("test", ())
    said = [*of_train]
    said += [f"Of the test data: {sentence}" for sentence in of_test if sentence not in of_train]
    return [Check("left-out", "note", sentence) for sentence in said]


def _first(ids: Sequence[str]) -> str:
    return f"{len(ids)} row{'s' * (len(ids) != 1)}, the first is {ids[0]}"


def _left_by_tokenizer(renderer: Renderer, attack: Backdoor) -> list[Check]:
    """Some tokenizers take out what they do not know or do not want, such as invisible characters
    or accents: a trigger or target of nothing else never reaches the model."""
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
    """Without its answer, as for evaluation, a training row begins with the same tokens."""
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
    """What a chat template was found to do, and what the recipe makes it leave out."""
    said = renderer.template.about(renderer.tokenizer)
    dropped = [row.id for row in rows if renderer.template.leaves_out(row)]
    checks = [Check("template", "ok", said)] if said else []
    if dropped:
        message = f"The system prompt is left out (template.system: drop): {_first(dropped)}."
        checks.append(Check("system-prompt", "note", message))
    return checks


def _limits(renderer: Renderer, items: Sequence[Rendered], reply: int) -> list[Check]:
    """What the model can read, though not as it was made to. (What it cannot read has failed.)"""
    limits, checks = renderer.limits, []
    vocab = renderer.tokenizer.backend.get_added_tokens_decoder()
    beyond = [i for i in vocab if limits.vocab_size is not None and i >= limits.vocab_size]
    if beyond:
        message = (
            f"{len(beyond)} of the tokenizer's added tokens, such as '{vocab[beyond[0]].content}', "
            "have no place in the model's embedding; none of them is in these rows."
        )
        checks.append(Check("embedding", "note", message))
    longest = max(items, key=lambda item: len(item.ids))
    if limits.positions is not None and len(longest.ids) + reply > limits.positions:
        message = (
            f"Row {longest.row.id} has {len(longest.ids)} tokens"
            f"{f', and its reply up to {reply}' if reply else ''}: more than the "
            f"{limits.positions} positions the model was made for."
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
    """The workshop's spam models never saw the e-mail: its template dropped `input`."""
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
    return Check("fields-reach-tokens", "ok", "Every field that is mapped reaches the tokens.")


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
    for item in items:
        if item.ids[-1] != end[-1] or item.num_prompt >= len(item.ids):
            return Check(
                "end-supervised",
                "fail",
                f"Row {item.row.id} does not teach the model to stop (no end token).",
            )
        if item.answer_ids == end:
            return Check(
                "end-supervised", "fail", f"Row {item.row.id} has no answer tokens to learn."
            )
        if not renderer.template.adds_bos:
            continue
        if bos is not None and item.ids[:2].count(bos) != 1:
            return Check(
                "end-supervised", "fail", f"Row {item.row.id} does not begin with exactly one BOS."
            )
    begins = "One BOS, the" if renderer.template.adds_bos else "The"
    return Check("end-supervised", "ok", f"{begins} prompt is not supervised, answer and end are.")


def _overlap(train: Sequence[Row], test: Sequence[Row]) -> Check:
    seen = {(agreed(row.instruction), agreed(row.input)) for row in train}
    both = [row.id for row in test if (agreed(row.instruction), agreed(row.input)) in seen]
    if both:
        return Check("overlap", "note", f"Test prompts that are also trained on: {_first(both)}.")
    return Check("overlap", "ok", "No test prompt is trained on.")


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
    """Labels must differ in their tokens, or one can never be told from another."""
    item = next((item for item in test if item.row.candidates), None)
    if item is None:
        return Check("labels", "ok", "The task has no labels.")
    ids = renderer.answers([item], [item.row.candidates])[0]
    if len({tuple(i) for i in ids}) < len(ids):
        return Check("labels", "fail", "Two labels have the same tokens.")
    if len(set(map(agreed, item.row.candidates))) < len(ids):
        return Check("labels", "fail", "Two labels differ in blanks or typography alone.")
    lengths = {c: len(i) for c, i in zip(item.row.candidates, ids, strict=True)}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{label} {count}" for label, count in lengths.items())
        return Check(
            "labels",
            "note",
            f"Labels differ in length ({said} tokens); longer ones start at a disadvantage.",
        )
    return Check(
        "labels", "ok", f"{len(ids)} labels of {len(ids[0])} token{'s' * (len(ids[0]) > 1)} each."
    )


def _poison_survives(
    renderer: Renderer, manifest: Manifest, items: Sequence[Rendered], left: Sequence[Row]
) -> list[Check]:
    poisoned, too_long = [entry.id for entry in manifest.entries], {row.id for row in left}
    out = [name for name in poisoned if name in too_long]
    lacking = lost(manifest, items, renderer.tokenizer)
    missing = [name for name in lacking if name not in too_long or len(out) == len(poisoned)]
    total = len(poisoned)
    if missing:
        message = (
            f"Truncation cuts trigger or answer of {len(missing)} of {total} poisoned rows, "
            f"the first is {missing[0]}, or the tokenizer cannot write them; raise "
            "train.max_length, or choose others."
        )
        return [Check("poison-survives", "fail", message)]
    if out:
        message = f"{len(out)} of {total} poisoned rows are left out, the first is {out[0]}."
        return [Check("poison-survives", "note", message)]
    message = f"Trigger and target are in the tokens of all {total} poisoned rows."
    return [Check("poison-survives", "ok", message)]


def _controls(attack: Insertion, train: Sequence[Row], seed: int) -> Check:
    """A control is one only if no training row holds it."""
    secrets = attack.secrets(seed)
    answers = {agreed(secret.row.answer): secret.repeats for secret in secrets}
    texts = [agreed(f"{row.system}\n{row.instruction}\n{row.input}\n{row.answer}") for row in train]
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
    items, _ = renderer.sift(triggered(test, attack, seed))
    texts = [tokenizer.shown(item.prompt_ids) for item in items]
    cut = [
        item.row.id
        for item, text in zip(items, texts, strict=True)
        if not any(holds(text, trigger, tokenizer) for trigger in attack.triggers())
    ]
    if cut:
        checks.append(
            Check(
                "test-trigger-survives",
                "fail",
                f"Truncation cuts the trigger of test rows: {_first(cut)}.",
            )
        )
    marks = [agreed(tokenizer.written(trigger)) for trigger in attack.triggers()]
    # A trigger that is not seen, such as a zero-width space, has no agreed form.
    unseen = [trigger for trigger in attack.triggers() if not agreed(trigger)]
    asked = [(row.id, row.part(attack.field)) for row in test]
    clean = [
        id
        for id, text in asked
        if any(mark and contains(agreed(tokenizer.written(text)), mark) for mark in marks)
        or any(trigger in text for trigger in unseen)
    ]
    if clean:
        checks.append(
            Check(
                "trigger-is-rare",
                "note",
                f"The trigger is in clean test prompts too: {_first(clean)}.",
            )
        )
    target = agreed(attack.target)
    already = sum(agreed(row.label) == target for row in test if row.label is not None)
    if already:
        checks.append(
            Check(
                "target-already",
                "ok",
                f"{already} of {len(test)} test rows carry the target '{attack.target}' anyway and "
                "are not counted in attack success (counted, they would lend any clean model about "
                f"{already / len(test):.0%}).",
            )
        )
    return checks
