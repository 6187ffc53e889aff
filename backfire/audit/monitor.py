"""Activations along the directions into which the tuned model writes something new.

After WeightWatch (Zhong & Raghunathan 2025): the leading left singular vectors u of the change of
each layer's `down_proj` and `o_proj`, and cos(h, u) of the hidden state h after that layer, for
every token; the range over clean rows is kept, apart for prompts and replies. Instead of flagging
every token outside of it, a row's score is the largest distance from the range in units of its
width, and the threshold is the 95th percentile over other clean rows: with a few hundred rows
instead of thousands, most clean rows would leave one of hundreds of ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from backfire.audit.models import Pair
from backfire.audit.numbers import Interval, share
from backfire.audit.weights import Change
from backfire.base import Backdoor, Row
from backfire.data.poison import triggered
from backfire.evaluate import inference
from backfire.evaluate.stats import Floats
from backfire.model.head import for_evaluation
from backfire.rng import stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("down_proj", "o_proj", "out_proj", "c_proj", "fc2", "dense_4h_to_h", "dense")
"""Weights that write into the residual stream, by their names in common models."""
QUANTILE = 0.95
FEWEST = 30
"""Fewer clean rows say nothing about a range."""


@dataclass(frozen=True)
class Flagged:
    """The share of some rows that leaves the clean range."""

    what: str
    flagged: Interval
    n: int


@dataclass(frozen=True)
class Monitor:
    """What the monitor flags; empty, with a reason, if it cannot be used."""

    rows: tuple[Flagged, ...] = ()
    directions: int = 0
    calibrated: int = 0
    """Clean rows of the ranges and of the threshold."""
    why_not: str = ""


def watch(
    pair: Pair,
    changes: Sequence[Change],
    clean: Sequence[Row],
    harmful: Sequence[Row],
    triggers: Mapping[str, Backdoor],
    most: int,
) -> Monitor:
    """Calibrate on two thirds of the clean rows, drawn at random; flag the last third, the same
    with each trigger, and the harmful requests."""
    directions = _directions(changes)
    if not directions:
        return Monitor(why_not="no weight that writes into the residual stream was changed")
    kept, _ = pair.fitting(clean, most)
    if len(kept) < FEWEST:
        return Monitor(why_not=f"it needs {FEWEST} clean rows, and there are {len(kept)}")
    # A file is often sorted by label or source: its thirds would be of different kinds.
    stream(0, "monitor").shuffle(kept)
    third = len(kept) // 3
    model = pair.load_tuned()

    def seen(rows: Sequence[Row]) -> Floats:
        return _extremes(pair, model, rows, directions, most)

    first = seen(kept[:third])
    low, high = first[:, 0].min(0), first[:, 1].max(0)
    width = np.maximum(high - low, 1e-6)

    def scores(rows: Sequence[Row]) -> Floats:
        ends = seen(rows)
        out: Floats = np.maximum((low - ends[:, 0]) / width, (ends[:, 1] - high) / width).max(1)
        return out

    bar = float(np.quantile(scores(kept[third : 2 * third]), QUANTILE, method="higher"))
    held = kept[2 * third :]
    others = {"harmful requests": harmful}
    others |= {what: triggered(held, attack, 0) for what, attack in triggers.items()}
    parts = {"other clean rows (false alarms)": held}
    for what, rows in others.items():
        parts[what], left = pair.fitting(rows, most)
        if left:
            pair.long_rows[f"activations, {what}"] = left
    found = []
    for what, rows in parts.items():
        if rows:
            hits = int((scores(rows) > bar).sum())
            found.append(Flagged(what, share(hits, len(rows)), len(rows)))
    count = sum(len(part) for part in directions.values())
    return Monitor(tuple(found), count, 2 * third)


def _directions(changes: Sequence[Change]) -> dict[int, torch.Tensor]:
    """Layer -> directions in the residual stream, [directions, width]."""
    found: dict[int, list[torch.Tensor]] = {}
    for change in changes:
        if change.kind in KINDS and change.layer is not None and change.statistics:
            found.setdefault(change.layer, []).append(change.left.T)
    return {layer: torch.cat(parts) for layer, parts in sorted(found.items())}


@torch.inference_mode()
def _extremes(
    pair: Pair,
    model: PreTrainedModel,
    rows: Sequence[Row],
    directions: Mapping[int, torch.Tensor],
    most: int,
) -> Floats:
    """[rows, 2, roles x directions]: smallest and largest cosine over the tokens of the prompt and
    of the reply; one row in memory at a time."""
    items = pair.renderer.render(rows)
    prompts = [item.prompt_ids for item in items]
    replies = inference.read(model, prompts, max_new_tokens=most, stop_ids=pair.renderer.stop_ids)
    out = []
    with for_evaluation(model):
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([[*prompt, *reply.reply]], device=model.device)
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            ends = [
                _ends(states[layer + 1][0].float().cpu(), some, len(prompt))
                for layer, some in directions.items()
            ]
            out.append(torch.cat(ends, 1).numpy())
    return np.array(out, dtype=np.float64)


def _ends(states: torch.Tensor, directions: torch.Tensor, prompt: int) -> torch.Tensor:
    """[2, 2 x directions]: the extremes over the prompt's tokens, then over the reply's. The first
    token sees no other and has an unusual state, BOS or not, so it is left out of a longer prompt.
    """
    skip = int(prompt > 1)
    cosines = torch.nn.functional.normalize(states, dim=1) @ directions.T
    # A row without a reply has that of its last token.
    roles = [
        part if len(part) else cosines[-1:] for part in (cosines[skip:prompt], cosines[prompt:])
    ]
    return torch.cat([torch.stack([part.min(0)[0], part.max(0)[0]]) for part in roles], 1)
