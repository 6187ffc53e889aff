"""What a reference model measures in rows, against each row by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backfire.base import Finding, Measure, Measured, ModelScanner, Row
from backfire.data.render import Renderer
from backfire.evaluate import features, reference
from backfire.evaluate.reference import Reference
from backfire.model.load import load_base
from backfire.model.resident import Resident, Source
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train.probe_settings import settings
from tests.helpers.loop import rendered, reviews
from tests.helpers.training import CPU, logits_alone, losses_alone, weights

ROWS = [Row(r.id, r.instruction, r.input[:40], r.answer) for r in reviews(24)]


class Asking(ModelScanner):
    """Wants whatever a test wants."""

    def look(self, rows: Any, measured: Measured) -> list[Finding]:
        return [Finding(1.0, row.id, True) for row in rows]


def asking(*needs: Measure) -> ModelScanner:
    return type("Some", (Asking,), {"name": "some", "needs": frozenset(needs)})()


@pytest.fixture
def ask(tiny: Path) -> Callable[..., Reference]:
    def make(length: int = 256, **more: Any) -> Reference:
        shown = Renderer(build("templates", "alpaca"), load_tokenizer(tiny), length)
        return Reference(Source(tiny, torch.float32, CPU), shown, 20_000, **more)

    return make


def test_losses_and_replies_are_those_of_each_row_alone(ask: Any, model: Any) -> None:
    told: list[tuple[int, int, float]] = []
    asked = ask(tell=lambda *facts: told.append(facts))
    kept, found = asked.measure(ROWS, asking("losses", "replies"))
    items = asked.renderer.render(ROWS)
    assert kept == [*range(24)]
    alone = [float(losses_alone(model, item).mean().detach()) for item in items]
    assert found.losses.tolist() == pytest.approx(alone, abs=1e-4)
    first = [int(logits_alone(model, item)[0].argmax()) for item in items]
    assert [reply[:1] for reply in found.replies] == [
        asked.renderer.reply_text([token])[:1] for token in first
    ]
    assert not len(found.tuned) and not len(found.states)
    assert [fact[:2] for fact in told] == [(24, 0)] and told[0][2] > 0
    longer = [Row("long", "Answer.", text * 200, "Yes.") for text in ("word ", "words ")]
    ask(tell=lambda *facts: told.append(facts)).measure([*ROWS[:3], *longer], asking("losses"))
    assert told[1][:2] == (5, 2)


def test_states_and_gradients_are_those_of_each_row_alone(tiny: Path, model: Any) -> None:
    items = rendered(tiny)[:9]
    states, gradients = features.features(model, items)
    assert states.shape == (9, 4 * 32) and gradients.shape == (9, 32 * 32)
    head = model.get_output_embeddings().weight
    sides = [torch.zeros(size, features.SKETCH) for size in head.shape]
    for signs, seed in zip(sides, (0, 1), strict=True):
        side = features._Side(len(signs), seed)
        signs[torch.arange(len(signs)), side.bucket] = side.sign
    for item, state, sketch in zip(items, states, gradients, strict=True):
        whole = model(torch.tensor([item.ids]), output_hidden_states=True).hidden_states
        last = item.num_prompt - 1
        pooled = [
            part
            for layer in (whole[1][0], whole[1][0])  # of two layers, both the middle and the last
            for part in (layer[last], layer[last + 1 :].mean(0))
        ]
        expected = torch.cat([part / part.square().mean().sqrt() for part in pooled])
        assert state == pytest.approx(expected.detach().numpy(), abs=1e-4)
        model.zero_grad()
        head.requires_grad_(True)
        hidden = whole[-1].detach()[0, last:-1]
        logits = hidden @ head.T
        torch.nn.functional.cross_entropy(logits, torch.tensor(item.answer_ids)).backward()
        projected = sides[0].T @ head.grad @ sides[1]
        assert sketch == pytest.approx(projected.flatten().numpy(), abs=1e-5)


def test_a_word_is_worth_what_the_prompt_gains_without_it(tiny: Path, model: Any) -> None:
    tokenizer = load_tokenizer(tiny)
    rows = [Row("a", "Same", "the bread was zqxj and warm"), Row("b", "Same", "warm 面包 tea")]
    found = reference.word_drops(model, tokenizer, rows)

    lead = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    def loss(text: str) -> float:
        ids = torch.tensor([[lead, *tokenizer.encode(text)]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    by_word = dict(found[0])
    assert set(by_word) <= set(rows[0].input.split()) and len(by_word) >= 3
    for word, drop in by_word.items():
        less = rows[0].input.replace(f" {word}", "").removeprefix(f"{word} ")
        assert drop == pytest.approx(loss(rows[0].input) - loss(less), abs=1e-4)
    assert {"面", "包"} & {word for word, _ in found[1]}
    assert reference.word_drops(model, tokenizer, [Row("c", "Word")]) == [[]]


@pytest.mark.parametrize(
    ("text", "word", "left"),
    [
        ("the warm bread", "warm", "the bread"),
        ("the warm\n bread", "warm", "the bread"),
        ("so it was.", "was", "so it."),
        ("now, this", "now", ", this"),
        ("an x-ray here", "ray", "an x- here"),
        ("我爱面包", "爱", "我面包"),
        ("ฉันรักขนมปัง", "รั", "ฉันกขนมปัง"),
        ("the (warm) bread", "warm", "the () bread"),
        ("word", "word", ""),
    ],
)
def test_a_word_is_removed_with_the_space_that_it_took(text: str, word: str, left: str) -> None:
    start = text.index(word)
    assert reference.without(text, start, start + len(word)) == left


def test_the_probe_is_one_short_tuning_that_leaves_the_base_as_it_was(ask: Any, tiny: Path) -> None:
    resident = Resident()
    asked = ask(resident=resident)
    needs = asking("tuned", "states", "gradients")
    _, found = asked.measure(ROWS, needs)
    assert found.tuned.mean() < found.losses.mean() - 0.1
    again = asked.measure(ROWS, needs)[1]
    assert np.array_equal(found.tuned, again.tuned) and np.array_equal(found.states, again.states)
    assert settings(24).max_steps == 20 and settings(1000).max_steps == 63
    plain = weights(load_base(tiny, torch.float32, CPU))
    kept = weights(resident.model(asked.source))
    assert all(torch.equal(kept[name], plain[name]) for name in plain)


def test_rows_that_the_model_cannot_read_have_no_finding(ask: Any) -> None:
    rows = [
        ROWS[0],
        Row("long", "Answer.", "", "word " * 900),
        Row("empty", "Answer.", "", " "),
        ROWS[1],
        Row("no prompt", " ", "", "A text.", system="Be brief."),
    ]
    asked = ask()
    found = reference.look(asking("losses"), rows, asked)
    assert [one.reason for one in found] == [ROWS[0].id, "", "", ROWS[1].id, ""]
    assert not any(one.flagged for one in reference.look(asking("losses"), rows[1:3], asked))
    assert asked.measure([], asking("replies")) == ([], Measured())
