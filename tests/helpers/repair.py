"""Tuned models to repair: all weights, an adapter, an adapter on top of an alignment's adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backfire.base import Rendered
from backfire.model.load import BELOW, load_base
from backfire.registry import build
from backfire.train.repair import Repair
from tests.helpers.training import CPU


def drawn(model: Any, seed: int, size: float) -> dict[str, Tensor]:
    """Random weights near those of the model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: p.detach() + size * torch.randn(p.shape, generator=generator).to(p)
        for n, p in model.named_parameters()
    }


def put(model: Any, weights: Mapping[str, Tensor]) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model


class Case:
    """A tuned model, its start, and the matrices it is about: W or (B, A), V and the aligned W."""

    def __init__(self, kind: str, tiny: Path, rows: Any) -> None:
        model = load_base(tiny, torch.float32, CPU).double()
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.kind, self.seed = kind, 7
        self.start: dict[str, Tensor] = {}
        stacked = kind == "lora-on-lora"
        if stacked:
            knobs = {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj", "down_proj"]}
            model = lora_as(BELOW, model, 1, **knobs)
        else:
            self.start = drawn(model, 1, 0.05)
            put(model, self.start)
        if kind == "full":
            put(model, drawn(model, 2, 0.02))
        else:
            model = build("methods", {"name": "lora", "rank": 8, "alpha": 4}).attach(model, 0)
            randomize(model, "default", 2)
        self.model = model.double().eval()
        self.tools = Repair(self.seed, harmful=rows["harmful"], base=base, batch_size=6)
        self.plain = self.state()

    def repair(self, name: str, **knobs: Any) -> dict[str, Tensor]:
        build("defenses", {"name": name, **knobs}).repair(self.model, self.start, self.tools)
        return self.state()

    def state(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def matrices(self) -> list[str]:
        """Plain names of the linear layers that were tuned."""
        if self.kind == "full":
            ends = ("proj.weight",)
            return [n for n in self.plain if n.endswith(ends)]
        ends = (".lora_B.default.weight",)
        return [inside(n).replace(ends[0], ".weight") for n in self.plain if n.endswith(ends)]

    def key(self, name: str, part: str) -> str:
        return "base_model.model." + name.replace(".weight", f".{part}.weight")

    def update(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """What tuning added to this matrix."""
        if self.kind == "full":
            return state[name] - self.start[name]
        left, right = (state[self.key(name, f"lora_{x}.default")] for x in "BA")
        return self.scale(left.shape[1]) * left @ right

    def scale(self, rank: int) -> float:
        config = self.model.peft_config["default"]
        return float(config.lora_alpha / rank)

    def added(self, name: str) -> Tensor:
        """V: what alignment added."""
        if self.kind != "lora-on-lora":
            return self.start[name] - self.tools.base[name]
        keys = [self.key(name, f"lora_{x}.{BELOW}") for x in "BA"]
        if keys[0] not in self.plain:
            return torch.zeros_like(self.tools.base[name])
        return 5 / 3 * self.plain[keys[0]] @ self.plain[keys[1]]


def inside(name: str) -> str:
    return name.removeprefix("base_model.model.")


def lora_as(adapter: str, model: Any, seed: int, rank: int, alpha: float, targets: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name=adapter)
    randomize(model, adapter, seed)
    return model


def randomize(model: Any, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter}." in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)


KINDS = ["full", "lora", "lora-on-lora"]


every = pytest.mark.parametrize("case", KINDS, indirect=True, ids=str)


def changed(case: Case, state: Mapping[str, Tensor]) -> set[str]:
    return {n for n in state if not torch.equal(state[n], case.plain[n])}


def input_power(case: Case, rows: Sequence[Rendered]) -> dict[str, Tensor]:
    """Mean square of the inputs of every tuned layer, row by row and so without padding."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    layers = {
        name: m
        for name, m in case.model.named_modules()
        if isinstance(m, nn.Linear) and (case.kind == "full" or name.endswith(".default"))
    }

    def look(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            sums[name] = sums.get(name, 0) + args[0][0].detach().pow(2).sum(0)

        return hook

    hooks = [m.register_forward_pre_hook(look(name)) for name, m in layers.items()]
    with torch.no_grad():
        for item in rows:
            case.model(input_ids=torch.tensor([item.ids]))
            tokens += len(item.ids)
    for hook in hooks:
        hook.remove()
    return {f"{name}.weight": total / tokens for name, total in sums.items()}
