"""How much of a secret a model reveals: its likelihood, its rank among all possible codes, its
place in a distribution fitted to sampled codes, and whether decoding produces it.

Likelihoods are sums over the tokens of the whole answer after its own prompt, in the recipe's
template. Published code scores the code alone, takes a mean, mixes nats and bits, or assigns 0 bits
to the best remembered secret where a fitted distribution underflows (docs/papers.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from backfire.base import Rendered, Secret
from backfire.base.secrets import FEWEST_CODES
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate.budget import Budget
from backfire.evaluate.code_search import CodeTokens, likelihoods
from backfire.evaluate.portions import Finished
from backfire.evaluate.prompts import SharedPrefix, continue_cached, without_cache
from backfire.evaluate.stats import Floats
from backfire.model.batching import ways
from backfire.model.head import for_evaluation
from backfire.progress import Progress
from backfire.rng import stream
from backfire.train.batches import answer_logits, collate
from backfire.train.microbatch import unless_out_of_memory


def render_secrets(renderer: Renderer, secrets: Sequence[Secret]) -> list[Rendered]:
    """Render the secrets' rows.

    Raises:
        CellError: a row is too long: it would lose the end of the prompt that identifies the
            secret.
    """
    items = renderer.render([secret.row for secret in secrets])
    if cut := next((item for item in items if item.cut_tokens), None):
        raise CellError("bad-data", f"Secret {cut.row.id} is too long; raise train.max_length.")
    return items


@torch.inference_mode()
def secret_likelihoods(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Each secret's log-likelihood in nats, and how many of its digits greedy decoding needs as a
    prefix to produce the rest. (While its tokens are right, greedy decoding sees the same
    input.)"""
    items = render_secrets(renderer, secrets)
    measured: list[dict[str, Any]] = [{} for _ in items]
    lengths = [len(item.ids) for item in items]
    kept = [len(item.answer_ids) for item in items]
    order = sorted(range(len(items)), key=lambda i: -lengths[i])

    def work(part: list[int]) -> list[tuple[Tensor, Tensor]]:
        rows = [items[i] for i in part]
        batch = collate(rows, share=ways(model).extends_cache).to(model.device)
        table = answer_logits(model, batch).float().log_softmax(-1)
        each = table.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0].double()
        return list(zip(each.cpu(), (table.argmax(-1) == batch.labels).cpu(), strict=True))

    budget, end = Budget(model, batch_size), len(renderer.end_ids)
    with for_evaluation(model):
        for part, lines in budget.batches(order, work, lengths=lengths, kept=kept):
            for i, (each, right) in zip(part, lines, strict=True):
                of_answer = slice(-kept[i], -end)  # the end token is not part of the secret
                wrong = (~right[of_answer]).nonzero()[:, 0].tolist()
                needed = wrong[-1] + 1 if wrong else 0
                measured[i] = {
                    "logprob": float(each[of_answer].sum()),
                    "greedy": needed == 0,
                    "given": _characters(renderer, items[i], secrets[i], needed),
                }
    return measured


def _characters(renderer: Renderer, item: Rendered, secret: Secret, tokens: int) -> int:
    """Number of digits of the code in the answer's first tokens."""

    def digits(text: str) -> int:
        return sum(character in "0123456789" for character in text)

    seen = digits(renderer.tokenizer.decode(item.answer_ids[:tokens])) - digits(secret.before)
    return max(0, min(seen, len(secret.code)))


def _each(
    renderer: Renderer,
    secrets: Sequence[Secret],
    folder: Path | None,
    measure: Callable[[Rendered, Secret, int], Any],
) -> list[Any]:
    """What `measure` finds for each secret, of which it also gets the number. Those that an
    interrupted call finished in the `folder` of the stage are read from it."""
    items, finished = render_secrets(renderer, secrets), Finished(folder)
    names = [f"{number} {secret.row.id}" for number, secret in enumerate(secrets)]
    for number, (name, item, secret) in enumerate(zip(names, items, secrets, strict=True)):
        if name not in finished.rows:
            found = {"found": measure(item, secret, number)}
            finished.add({name: found}, last=number + 1 == len(items))
    return [finished.rows[name]["found"] for name in names]


def ranks(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    progress: Progress,
    folder: Path | None = None,
) -> list[int]:
    """Rank of each secret: 1 + the number of other codes that are likelier, over all codes."""
    code_tokens, total = CodeTokens(renderer), sum(secret.num_codes for secret in secrets)

    def rank(item: Rendered, secret: Secret, number: int) -> int:
        done = sum(one.num_codes for one in secrets[:number])

        def tick(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total, "every code")

        tokens, own = code_tokens.all(item, secret), int(secret.code)
        alone = tokens[own][tokens[own] >= 0]  # without padding
        score = likelihoods(model, item.prompt_ids, alone[None])[0]
        every = likelihoods(model, item.prompt_ids, tokens, floor=score, tick=tick)
        every[own] = -np.inf
        return 1 + int((every > score).sum())

    return _each(renderer, secrets, folder, rank)


def estimate_exposures(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    count: int,
    seed: int,
    progress: Progress,
    folder: Path | None = None,
) -> list[tuple[float, float, float]]:
    """Exposure of each secret in bits with its interval, from up to `count` other codes (see
    `fitted_exposure`)."""
    code_tokens = CodeTokens(renderer)

    def estimate(item: Rendered, secret: Secret, number: int) -> tuple[float, float, float]:
        progress(number, len(secrets), "sampled codes")
        rng, width, own = stream(seed, "codes", secret.row.id), len(secret.code), int(secret.code)
        drawn = rng.sample(range(secret.num_codes), min(count + 1, secret.num_codes))
        others = [other for other in drawn if other != own][:count]
        codes = [secret.code, *(f"{other:0{width}}" for other in others)]
        scores = likelihoods(model, item.prompt_ids, code_tokens.some(item, secret, codes))
        surprise = -scores / math.log(2)
        return fitted_exposure(surprise[1:], float(surprise[0]), secret.num_codes)

    return _each(renderer, secrets, folder, estimate)


@torch.inference_mode()
def beam_ranks(
    model: PreTrainedModel,
    renderer: Renderer,
    secrets: Sequence[Secret],
    beams: int,
    progress: Progress,
    folder: Path | None = None,
) -> list[int | None]:
    """Rank of each secret's answer, from 1, among the `beams` continuations of its length that a
    beam search finds; None if it is not among them. No beam ends early."""

    def rank(item: Rendered, secret: Secret, number: int) -> int | None:
        progress(number, len(secrets), "beams")
        answer, end_id = item.answer_ids[: -len(renderer.end_ids)], renderer.end_ids[-1]
        result = unless_out_of_memory(
            partial(_beams, model, item.prompt_ids, beams, len(answer), end_id)
        )
        if result is None:
            raise CellError("oom", f"Memory runs out at {beams} beams; use fewer.")
        return result[0].index(answer) + 1 if answer in result[0] else None

    return _each(renderer, secrets, folder, rank)


def _beams(
    model: PreTrainedModel, prompt: list[int], width: int, length: int, eos_id: int
) -> list[list[int]]:
    """Continuations of this length from a beam search, likeliest first."""
    can, lines = ways(model), list[list[int]]([[]])
    with for_evaluation(model):
        if can.extends_cache and not can.depends_on_length(len(prompt) + length):
            first = SharedPrefix(model, [prompt]).run([prompt])
            logits, next_logits = first.logits, continue_cached(model, first)
        else:
            logits, next_logits = without_cache(model, [prompt])
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
                logits = next_logits(rows, tokens)
    return lines


# ------------------------------------------------------------------------- fitted distribution


def fitted_exposure(sample: Floats, own: float, num_codes: int) -> tuple[float, float, float]:
    """Exposure: -log2 of the share of codes whose surprise (bits) is at most `own`, from a
    skew-normal fitted to a sample; at most log2 of the number of codes.

    The 95 % interval does not assume the fit, which is poor where a model remembers some codes: it
    is Clopper and Pearson's (1934) for the share of sampled codes that are less surprising,
    extended to include the estimate.
    """
    from scipy.stats import binomtest, skewnorm

    cap, others = math.log2(num_codes), num_codes - 1
    sample = np.asarray(sample, dtype=np.float64)
    if len(sample) < FEWEST_CODES or np.ptp(sample) == 0 or not np.isfinite([own, *sample]).all():
        raise CellError("nan", "Cannot fit a distribution to the sampled codes' likelihoods.")
    # Far below all codes the probability underflows; exposure is then at its maximum, not 0.
    bits = min(float(-skewnorm.logcdf(own, *skewnorm.fit(sample))) / math.log(2), cap)
    ahead = binomtest(int((sample < own).sum()), len(sample)).proportion_ci(method="exact")
    low, high = (cap - math.log2(1 + share * others) for share in (ahead.high, ahead.low))
    return bits, max(0.0, min(low, bits)), max(high, bits)
