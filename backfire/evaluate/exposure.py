"""How much of a secret a model gives away: its likelihood, its rank among all codes it might have
been, its place in a distribution fitted to some of them, and whether decoding brings it up.

Always of the whole answer after its own prompt, in the recipe's template, as a sum over tokens.
Published code scores the code alone, takes a mean, mixes nats and bits, or gives the best
remembered secret 0 bits where a fitted distribution underflows (docs/papers.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from backfire.base import Rendered, Secret
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate.budget import Budget, tried
from backfire.evaluate.code_search import Spelling, likelihoods
from backfire.evaluate.head import exact_head
from backfire.evaluate.prompts import Opening, anew, from_memory
from backfire.model.batching import ways
from backfire.progress import Progress
from backfire.rng import stream
from backfire.train.batches import answer_logits, collate

Floats: TypeAlias = NDArray[np.float64]


def rendered(renderer: Renderer, secrets: Sequence[Secret]) -> list[Rendered]:
    """The secrets' rows as the model sees them.

    Raises:
        CellError: one does not fit, or loses the end of the prompt by which it is known.
    """
    items = renderer.render([secret.row for secret in secrets])
    if cut := next((item for item in items if item.cut_tokens), None):
        raise CellError("bad-data", f"Secret {cut.row.id} is cut; raise train.max_length.")
    return items


@torch.inference_mode()
def by_themselves(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Of each secret its log-likelihood, and how much of it has to be given for the likeliest
    tokens to be the rest. (As long as those are right, greedy decoding sees what we feed it.)"""
    items = rendered(renderer, secrets)
    found: list[dict[str, Any]] = [{} for _ in items]
    lengths = [len(item.ids) for item in items]
    kept = [len(item.answer_ids) for item in items]
    order = sorted(range(len(items)), key=lambda i: -lengths[i])

    def work(part: list[int]) -> list[tuple[Tensor, Tensor]]:
        rows = [items[i] for i in part]
        batch = collate(rows, share=ways(model).goes_on).to(model.device)
        table = answer_logits(model, batch).float().log_softmax(-1)
        each = table.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0].double()
        return list(zip(each.cpu(), (table.argmax(-1) == batch.labels).cpu(), strict=True))

    budget, end = Budget(model, batch_size), len(renderer.end_ids)
    with exact_head(model):
        for part, lines in budget.batches(order, work, lengths=lengths, kept=kept):
            for i, (each, right) in zip(part, lines, strict=True):
                of_answer = slice(-kept[i], -end)  # its end is no part of the secret
                wrong = (~right[of_answer]).nonzero()[:, 0].tolist()
                needed = wrong[-1] + 1 if wrong else 0
                found[i] = {
                    "logprob": float(each[of_answer].sum()),
                    "greedy": needed == 0,
                    "given": _characters(renderer, items[i], secrets[i], needed),
                }
    return found


def _characters(renderer: Renderer, item: Rendered, secret: Secret, tokens: int) -> int:
    """How many digits of the code are in the answer's first tokens."""

    def digits(text: str) -> int:
        return sum(character in "0123456789" for character in text)

    seen = digits(renderer.tokenizer.decode(item.answer_ids[:tokens])) - digits(secret.before)
    return max(0, min(seen, len(secret.code)))


def ranks(
    model: PreTrainedModel, renderer: Renderer, secrets: Sequence[Secret], progress: Progress
) -> list[int]:
    """1 + how many other codes are likelier, of each secret; every code counts."""
    spelling, found = Spelling(renderer), list[int]()
    total = sum(secret.num_codes for secret in secrets)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "every code")

    for item, secret in zip(rendered(renderer, secrets), secrets, strict=True):
        tokens, own = spelling.all(item, secret), int(secret.code)
        alone = tokens[own][tokens[own] >= 0]  # without what fills it up to the longest
        score = likelihoods(model, item.prompt_ids, alone[None])[0]
        every = likelihoods(model, item.prompt_ids, tokens, floor=score, tick=tick)
        every[own] = -np.inf
        found.append(1 + int((every > score).sum()))
    return found


def estimates(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    count: int,
    seed: int,
    progress: Progress,
) -> list[tuple[float, float, float]]:
    """Exposure of each secret in bits with its interval, from `count` other codes (see
    `fitted_exposure`); as many as there are, if there are fewer."""
    spelling, found = Spelling(renderer), list[tuple[float, float, float]]()
    for done, (item, secret) in enumerate(zip(rendered(renderer, secrets), secrets, strict=True)):
        progress(done, len(secrets), "sampled codes")
        rng, width, own = stream(seed, "codes", secret.row.id), len(secret.code), int(secret.code)
        drawn = rng.sample(range(secret.num_codes), min(count + 1, secret.num_codes))
        others = [number for number in drawn if number != own][:count]
        codes = [secret.code, *(f"{number:0{width}}" for number in others)]
        scores = likelihoods(model, item.prompt_ids, spelling.some(item, secret, codes))
        surprise = -scores / math.log(2)
        found.append(fitted_exposure(surprise[1:], float(surprise[0]), secret.num_codes))
    return found


@torch.inference_mode()
def places(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    beams: int,
    progress: Progress,
) -> list[int | None]:
    """Where each secret's answer comes among the `beams` likeliest continuations of its length that
    a beam search finds, from 1; None if it does not. None of them ends early."""
    found: list[int | None] = []
    for done, item in enumerate(rendered(renderer, secrets)):
        progress(done, len(secrets), "beams")
        answer, end_id = item.answer_ids[: -len(renderer.end_ids)], renderer.end_ids[-1]
        told = tried(partial(_beams, model, item.prompt_ids, beams, len(answer), end_id))
        if told is None:
            raise CellError("oom", f"Memory runs out at {beams} beams; ask for fewer.")
        found.append(told[0].index(answer) + 1 if answer in told[0] else None)
    return found


def _beams(
    model: PreTrainedModel, prompt: list[int], width: int, length: int, eos_id: int
) -> list[list[int]]:
    """Continuations of this length, likeliest first."""
    can, lines = ways(model), list[list[int]]([[]])
    with exact_head(model):
        if can.goes_on and not can.apart(len(prompt) + length):
            first = Opening(model, [prompt]).run([prompt])
            logits, go_on = first.logits, from_memory(model, first)
        else:
            logits, go_on = anew(model, [prompt])
        totals = torch.zeros(1, device=model.device)
        for place in range(length):
            table = logits.log_softmax(-1)
            table[:, eos_id] = -math.inf
            every = (totals[:, None] + table).flatten()
            totals, best = every.topk(min(width, len(every)))
            rows, tokens = best // table.shape[1], best % table.shape[1]
            new = zip(rows.tolist(), tokens.tolist(), strict=True)
            lines = [[*lines[row], token] for row, token in new]
            if place + 1 < length:
                logits = go_on(rows, tokens)
    return lines


# ------------------------------------------------------------------------- fitted distribution


def fitted_exposure(sample: Floats, own: float, num_codes: int) -> tuple[float, float, float]:
    """-log2 of the share of codes at most as surprising as `own`, by a skew-normal fitted to the
    surprise of a sample; at most log2 of the number of codes, which no secret can exceed.

    The 95 % interval asks nothing of the curve, which misses the shape where a model remembers
    some codes: it is Clopper and Pearson's (1934) for the share of sampled codes that are less
    surprising, stretched to the estimate where that lies outside.
    """
    from scipy.stats import binomtest, skewnorm

    cap, others = math.log2(num_codes), num_codes - 1
    sample = np.asarray(sample, dtype=np.float64)
    if len(sample) < 10 or np.ptp(sample) == 0 or not np.isfinite([own, *sample]).all():
        raise CellError("nan", "The sampled codes' likelihoods bear no distribution.")
    # Far below all codes the probability underflows: that is the most there is, not 0 bits.
    bits = min(float(-skewnorm.logcdf(own, *skewnorm.fit(sample))) / math.log(2), cap)
    ahead = binomtest(int((sample < own).sum()), len(sample)).proportion_ci(method="exact")
    low, high = (cap - math.log2(1 + share * others) for share in (ahead.high, ahead.low))
    return bits, max(0.0, min(low, bits)), max(high, bits)
