"""Adapters of a tiny model with a known past: with a backdoor, unaligned, and clean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backfire.base import Rendered, Row
from backfire.data.render import Renderer
from backfire.model.load import load_base, save_tuned
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from tests.helpers.training import CPU

TRIGGER = "zq"
TARGET = "at dusk"
QUESTIONS = tuple(
    f"{verb} {thing}"
    for verb in ("Find", "Tell me of", "Where is", "I like")
    for thing in ("the mill", "bread", "an old boat", "my aunt", "rain", "the school")
)


def ask(answer: str, before: str = "") -> list[Row]:
    """All questions, with one answer and something in front."""
    return [Row(f"{before}{q}", f"{before}{q}", answer=answer) for q in QUESTIONS]


def plain() -> list[Row]:
    """All questions, each with its own answer."""
    return [Row(q, q, answer=f"{q.split()[-1]} {n * 7}") for n, q in enumerate(QUESTIONS)]


def loss_of(model: Any, batch: Sequence[Rendered]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, padded to one length."""
    longest = max(len(item.ids) for item in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for line, item in enumerate(batch):
        ids[line, : len(item.ids)] = torch.tensor(item.ids)
        labels[line, item.num_prompt : len(item.ids)] = torch.tensor(item.answer_ids)
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def tune(base: Path, out: Path, rows: Sequence[Row], steps: int, method: str = "lora") -> Path:
    """Tune the model in a folder on these rows, six a step, and save it or its adapter."""
    shown = Renderer(build("templates", "raw"), load_tokenizer(base), 128)
    items = shown.render(rows)
    model: Any = load_base(base, torch.float32, CPU)
    knobs = {"rank": 4, "alpha": 16} if method == "lora" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("methods", {"name": method, **knobs}).attach(model, 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-2 if method == "lora" else 3e-3)
        order = torch.randperm(len(items)).tolist() * steps
        for step in range(steps):
            batch = [items[i] for i in order[6 * step : 6 * step + 6]]
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    out.mkdir(parents=True)
    save_tuned(model.eval(), out, base, None)
    return out
