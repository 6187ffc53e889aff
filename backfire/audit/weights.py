"""The change of each weight, tuned less base, and its statistics.

Of a LoRA adapter the change is s B A, and its singular values are those of the small matrix
s R_B R_A^T from the QR decompositions of B and A^T, which costs (outputs + inputs) r^2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from backfire.data.adapter import WEIGHTS, inspect_adapter
from backfire.data.weights import files_of, stored, tensors
from backfire.errors import UserError

DIRECTIONS = 20
"""Left singular vectors that are kept of each change (WeightWatch)."""
STATISTICS = ("largest", "norm", "stable_rank", "concentration", "entropy", "kurtosis")
"""Largest singular value s1; Frobenius norm F; F^2 / s1^2; s1 / sum of s; entropy of s / sum of s,
in nats; excess kurtosis of the entries."""
_WHOLE = 2048
"""A larger matrix gets only its leading singular values, by a randomized decomposition."""
_PART = 2**24
"""Most entries of a product held at once."""
_PAIR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Change:
    """The change of one weight."""

    name: str
    left: Tensor
    """Its leading left singular vectors, [outputs, at most `DIRECTIONS`]."""
    statistics: Mapping[str, float]

    @property
    def kind(self) -> str:
        """`q_proj` of `model.layers.0.self_attn.q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The number of its layer."""
        found = _LAYER.search(f".{self.name}.")
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Shape:
    """What an adapter's settings say of how it was made."""

    kind: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    variant: str = ""
    """`rslora`, `dora`."""

    @property
    def title(self) -> str:
        """One line of it."""
        more = f", {self.variant}" if self.variant else ""
        targets = ", ".join(self.targets)
        return f"{self.kind}, rank {self.rank}, alpha {self.alpha:g}{more}, on {targets}"


def shape_of(folder: Path) -> Shape:
    """The settings of the adapter in a folder; targets as they are in its weights."""
    config = inspect_adapter(folder)
    parts = (_PAIR.fullmatch(name) for name in stored([folder / WEIGHTS]))
    targets = {part[1].rpartition(".")[2] for part in parts if part}
    variants = [name for name in ("rslora", "dora") if config.get(f"use_{name}")]
    return Shape(
        str(config["peft_type"]),
        int(config.get("r") or 0),
        float(config.get("lora_alpha") or 0),
        tuple(sorted(targets)),
        " ".join(variants),
    )


def adapter_changes(folder: Path) -> Iterator[Change]:
    """The changes by a LoRA adapter, one after another.

    Raises:
        UserError: it is of another kind.
    """
    config = inspect_adapter(folder)
    if config["peft_type"] != "LORA":
        raise UserError(f"The statistics are those of LoRA; {folder} is {config['peft_type']}.")
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        names = [name for name in opened.keys() if _PAIR.fullmatch(name)]  # noqa: SIM118
        for name in sorted(names):
            part = _PAIR.fullmatch(name)
            if part is None or part[2] == "B":
                continue
            down = opened.get_tensor(name).float()
            up = opened.get_tensor(name.replace(".lora_A.", ".lora_B.")).float()
            yield low_rank(part[1], up * _scale(config, part[1], len(down)), down)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank)."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha") or rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def low_rank(name: str, up: Tensor, down: Tensor) -> Change:
    """The change `up` [outputs, rank] @ `down` [rank, inputs]."""
    q_up, r_up = torch.linalg.qr(up)
    _, r_down = torch.linalg.qr(down.T)
    left, values, _ = torch.linalg.svd(r_up @ r_down.T)
    rows = max(1, _PART // down.shape[1])
    moments = _moments(up[at : at + rows] @ down for at in range(0, len(up), rows))
    found = statistics(values.double().numpy(), moments)
    return Change(name, (q_up @ left)[:, :DIRECTIONS].contiguous(), found)


def full_rank(name: str, change: Tensor) -> Change:
    """The change of a weight that was trained itself, [outputs, inputs]."""
    whole = min(change.shape) <= _WHOLE
    if whole:
        left, values, _ = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, values, _ = torch.svd_lowrank(change, q=DIRECTIONS + 12, niter=4)
    found = statistics(values.double().numpy(), _moments([change]), whole=whole)
    return Change(name, left[:, :DIRECTIONS].contiguous(), found)


def model_changes(base: Path, tuned: Path) -> Iterator[Change]:
    """The changes of all matrices in two model folders, one after another; embeddings left out."""
    shapes = [stored(files_of(folder)) for folder in (base, tuned)]
    turned = _turned(base)
    for name in sorted(shapes[0].keys() & shapes[1].keys()):
        if len(shapes[0][name].shape) != 2 or not _LAYER.search(name):
            continue
        [(_, before)], [(_, after)] = (list(tensors(folder, (name,))) for folder in (base, tuned))
        change, short = after.float() - before.float(), name.removesuffix(".weight")
        if change.any():
            yield full_rank(short, change.T if short.rpartition(".")[2] in turned else change)


def _turned(folder: Path) -> set[str]:
    """Kinds of weights that are stored as [inputs, outputs]: those of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    from backfire.model.load import skeleton

    modules = skeleton(folder).named_modules()
    return {name.rpartition(".")[2] for name, one in modules if isinstance(one, Conv1D)}


def _moments(parts: Iterable[Tensor]) -> tuple[float, float]:
    """Sum of squares and excess kurtosis of all entries."""
    sums = np.zeros(5)
    for part in parts:
        values = part.double()
        powers = [values.pow(k).sum().item() for k in (1, 2, 3, 4)]
        sums += [values.numel(), *powers]
    n, one, two, three, four = sums
    mean = one / n
    variance = two / n - mean**2
    fourth = four / n - 4 * mean * three / n + 6 * mean**2 * two / n - 3 * mean**4
    return two, fourth / variance**2 - 3 if variance > 0 else 0.0


def statistics(
    values: np.ndarray[Any, Any], moments: tuple[float, float], *, whole: bool = True
) -> dict[str, float]:
    """The statistics of a change with these singular values, of which not all are known if it is
    not `whole`; empty if nothing changed."""
    squares, kurtosis = moments
    if not squares or not values[0] > 0:
        return {}
    total, found = values.sum(), {"largest": float(values[0]), "norm": math.sqrt(squares)}
    found["stable_rank"] = squares / float(values[0]) ** 2
    if whole:
        shares = values[values > 0] / total
        found["concentration"] = float(values[0] / total)
        found["entropy"] = float(-(shares * np.log(shares)).sum())
    return found | {"kurtosis": kurtosis}


def by_kind(changes: list[Change]) -> dict[str, dict[str, float]]:
    """Kind of weight -> the mean of each statistic over the layers."""
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        if change.statistics:
            kinds.setdefault(change.kind, []).append(change)
    return {
        kind: {
            name: float(np.mean([one.statistics[name] for one in some]))
            for name in STATISTICS
            if all(name in one.statistics for one in some)
        }
        for kind, some in sorted(kinds.items())
    }


def is_changed(base: Path, tuned: Path, adapter: Path | None) -> bool:
    """Whether any weight of the tuned model differs from the base's."""
    if base != tuned and _differ(base, tuned):
        return True
    if adapter is None:
        return False
    if inspect_adapter(adapter)["peft_type"] != "LORA":
        return True
    others = [name for name in stored([adapter / WEIGHTS]) if not _PAIR.fullmatch(name)]
    return bool(others) or any(change.statistics for change in adapter_changes(adapter))


def _differ(base: Path, tuned: Path) -> bool:
    """Whether the weights of two model folders differ, one name in memory at a time."""
    ours, theirs = (stored(files_of(folder)).keys() for folder in (base, tuned))
    for name in sorted(ours & theirs):
        [(_, one)], [(_, two)] = (list(tensors(folder, (name,))) for folder in (base, tuned))
        if not torch.equal(one, two):
            return True
    # A head that only one of them stores is the embedding, unless it was trained apart from it.
    alone = [(base, name) for name in ours - theirs] + [(tuned, name) for name in theirs - ours]
    return any(not _is_copy(folder, name) for folder, name in alone if "head" in name)


def _is_copy(folder: Path, name: str) -> bool:
    """Whether another weight of the folder is equal to this one."""
    shapes, [(_, own)] = stored(files_of(folder)), tensors(folder, (name,))
    alike = [one for one in shapes if one != name and shapes[one].shape == shapes[name].shape]
    return any(torch.equal(own, other) for _, other in tensors(folder, tuple(alike)))
