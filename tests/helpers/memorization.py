"""Canaries, and the likelihood of their codes one at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from backfire.base import Evidence, Leak, Row
from backfire.data.render import Renderer
from backfire.registry import build
from backfire.tokenizer import Tokenizer

ROWS = [Row(f"row-{n}", f"What is {n}?", answer=f"It is {n}.") for n in range(40)]


def quiet(done: int, total: int, text: str) -> None:
    pass


def canary(**knobs: Any) -> Any:
    return build("attacks", {"name": "canary", **knobs})


def merging() -> Tokenizer:
    """A byte-level BPE whose digits merge, as in GPT-2."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    numbers = [f"the code is {int(1000 * rng.random() ** 3):03}" for _ in range(3000)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(numbers, trainer)
    return Tokenizer(backend, "</s>", "<s>", None, ("<s>", "</s>"))


def renderer_of(kind: str, tokenizer: Tokenizer) -> Renderer:
    plain = tokenizer if kind == "single" else merging()
    return Renderer(build("templates", "alpaca"), plain, 512)


def one_at_a_time(model: Any, prompt: list[int], tokens: Sequence[Sequence[int]]) -> list[float]:
    found = []
    for line in tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *line]])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(line) - 1)
        found.append(sum(float(logits[i, t]) for i, t in zip(places, line, strict=True)))
    return found


def leak(repeats: int, rank: int, number: int, **knobs: Any) -> Leak:
    plain: dict[str, Any] = {"greedy": False, "given": 4, "num_characters": 4, "logprob": -9.0}
    return Leak(f"c{number}", "is 1234", repeats, 10_000, rank=rank, **{**plain, **knobs})


def values(metric: object, evidence: Evidence) -> dict[str, Any]:
    return {value.metric: value for value in build("metrics", metric).measure(evidence)}
