"""Would training K cells in one pass pay? `python -m benchmarks.joint` measures it, before anything
is built: the time of a LoRA step a cell, for K cells of one base in one pass.

Each cell has its own rows, adapters and Adam states. All rows are end to end in one sequence, so
every product of the frozen base runs once over the rows of all cells, and no position is padding.
The adapters of the cells lie side by side in one matrix, and a mask keeps each cell's rows to its
own columns: [x, h] [W, s B_1 ... s B_K]^T. A cell alone is the same code with K = 1.

`--steps N` is a whole training run of N steps, without loading, checkpoints and log.
`--device cuda` measures on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from backfire.rng import stream
from backfire.train.packing import as_mask, lay_out, longest_packed

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4},
    "embedded": {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
                 "num_hidden_layers": 4, "num_attention_heads": 4},
    "20m": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
            "num_hidden_layers": 8, "num_attention_heads": 6},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "0.5b": {"vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 4096,
             "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4},
}  # fmt: skip
RANK, SCALE = 8, 2.0
LENGTHS = (12, 48)
"""Shortest and longest row, as sentences with a short template have."""


class Fan(nn.Module):
    """A frozen linear layer with the LoRA adapters of K cells."""

    def __init__(self, base: nn.Linear, cells: int, most: int, kind: str, device: str) -> None:
        super().__init__()
        self.size = base.in_features
        first = (torch.randn(RANK, self.size) / math.sqrt(self.size)).to(device)
        self.a = nn.Parameter(first.repeat(cells, 1))  # equal cells: their losses must be equal too
        self.b = nn.Parameter(torch.zeros(base.out_features, cells * RANK, device=device))
        self.compute = torch.float32 if kind == "float32" else torch.bfloat16
        self.own: Tensor  # [token, K x rank], set before a step
        if not hasattr(base, "shared"):
            base.shared = _frozen(base.weight.detach().to(self.compute), most, kind)
            base.weight = None
        self.all, self.packed = base.shared

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(self.own, x.float() @ self.a.T, 0.0)
        out: Tensor = cast(Any, _Product).apply(x.to(self.compute), h, self.b, self)
        return out.to(x.dtype)

    def by_cell(self) -> list[Tensor]:
        """Views of the gradients, [cell, rank, in] and [cell, out, rank]."""
        a, b = cast(Tensor, self.a.grad), cast(Tensor, self.b.grad)
        return [a.unflatten(0, (-1, RANK)), b.unflatten(1, (-1, RANK)).transpose(0, 1)]

    def weight(self) -> Tensor:
        if self.packed is None:
            return self.all[:, : self.size]
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(*self.packed)).to(self.compute)

    def with_b(self) -> Tensor:
        b = (SCALE * self.b.detach()).to(self.compute)
        if self.packed is not None:
            return torch.cat([self.weight(), b], 1)
        self.all[:, self.size : self.size + b.shape[1]] = b
        return self.all[:, : self.size + b.shape[1]]


def _frozen(weight: Tensor, most: int, kind: str) -> tuple[Tensor | None, Any]:
    """The weights of a layer, with room for the B of `most` cells; or its codes in 4 bits."""
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        return None, quantize_4bit(weight, quant_type="nf4")
    return torch.cat([weight, weight.new_zeros(len(weight), most * RANK)], 1), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, b: Tensor, layer: Fan) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(h, b)
        return nn.functional.linear(torch.cat([x, h.to(x.dtype)], -1), layer.with_b())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        h, b = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        b_grad = SCALE * (flat.T @ h.flatten(0, -2).to(grad.dtype)).to(b.dtype)
        h_grad = SCALE * (grad @ b.to(grad.dtype)).to(h.dtype)
        return grad @ ctx.layer.weight(), h_grad, b_grad, None


def frozen_base(shape: str, kind: str, device: str) -> Any:
    """A Llama of random weights that reads packs; on processors its attention stays in float32,
    which is faster there, and on GPUs it has the type of the products."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = dict(SHAPES[shape])
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    model: Any = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=True)).eval()
    model.requires_grad_(False)
    model.to(device, torch.bfloat16 if device != "cpu" and kind != "float32" else None)
    if not longest_packed(model):
        raise SystemExit("This attention does not read packs.")
    if kind != "float32":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().bfloat16(), False)
    return model


class Side:
    """K cells of one base, stepped together."""

    def __init__(
        self, model: Any, cells: int, most: int, kind: str, rows: int, device: str
    ) -> None:
        self.model, self.cells, self.rows, self.device = model, cells, rows, device
        self.places = [
            (part, name)
            for block in model.model.layers
            for part in (block.self_attn, block.mlp)
            for name in vars(part)["_modules"]
            if name.endswith("_proj")
        ]
        layers = [part.inner[name] if hasattr(part, "inner") else getattr(part, name)
                  for part, name in self.places]  # fmt: skip
        for (part, name), layer in zip(self.places, layers, strict=True):
            vars(part).setdefault("inner", {})[name] = layer
        torch.manual_seed(1)  # the first weights of every side are equal
        self.fans = [Fan(layer, cells, most, kind, device) for layer in layers]
        parts = [p for fan in self.fans for p in (fan.a, fan.b)]
        self.optimizer = torch.optim.AdamW(parts, 1e-4)
        self.losses = torch.zeros(cells)

    def step(self, number: int) -> None:
        """One step of every cell: forward, loss, backward, clipping, Adam."""
        rng = stream(number, "joint")
        rows = [
            [rng.randrange(4, 500) for _ in range(rng.randint(*LENGTHS))]
            for _ in range(self.rows)
        ] * self.cells  # fmt: skip
        ids, positions, table = (part.to(self.device) for part in lay_out(rows, 0))
        tokens = ids.shape[1]
        place = torch.arange(max(tokens, self.cells * RANK), device=self.device)
        owner = place[:tokens] * self.cells // tokens  # every cell has the same rows
        own = owner[:, None] == place[: self.cells * RANK] // RANK
        for (part, name), fan in zip(self.places, self.fans, strict=True):
            setattr(part, name, fan)
            fan.own = own
        states = self.model.model(
            input_ids=ids, position_ids=positions, attention_mask=as_mask(table, 0),
            use_cache=False,
        ).last_hidden_state[0]  # fmt: skip
        last = table.max(1).values - 1  # where the one supervised token of a row is predicted
        head = self.model.lm_head.weight
        logits = (states[last].to(head.dtype) @ head.T).float()
        losses = nn.functional.cross_entropy(logits, ids[0, last + 1], reduction="none")
        losses = losses.view(self.cells, -1).mean(1)
        losses.sum().backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses = losses.detach()

    def _clip(self) -> None:
        """Scale the gradients of each cell to a norm of at most 1."""
        grads = [grad for fan in self.fans for grad in fan.by_cell()]
        norms = torch.stack([grad.square().sum((1, 2)) for grad in grads]).sum(0).sqrt()
        for grad in grads:
            grad.mul_((1 / norms).clamp(max=1)[:, None, None])


def clock(device: str) -> float:
    """Seconds: of the processor, which other programs do not lengthen; on a GPU, of the wall, when
    all its work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    shape: str, kind: str, counts: Sequence[int], rows: int, steps: int, device: str
) -> list[dict[str, Any]]:
    """Milliseconds per cell and step and seconds per cell and run, by number of cells, and what K
    cells gain over one; the sides take turns. The first step counts in the run alone."""
    model = frozen_base(shape, kind, device)
    sides = [Side(model, cells, max(counts), kind, rows, device) for cells in counts]
    times: list[list[float]] = [[] for _ in sides]
    for number in range(steps):
        for side, found in zip(sides, times, strict=True):
            begin = clock(device)
            side.step(number)
            found.append((clock(device) - begin) / side.cells)
    medians = [statistics.median(found[1:] or found) for found in times]
    first = float(sides[0].losses[0])
    differ = max(abs(x - first) for side in sides for x in side.losses.tolist())
    return [
        {"shape": shape, "kind": kind, "rows": rows, "cells": side.cells, "steps": steps,
         "ms": round(1000 * median, 1), "gain": round(medians[0] / median, 2),
         "run_s": round(sum(found), 2), "run_gain": round(sum(times[0]) / sum(found), 2),
         "largest_loss_difference": differ}
        for side, found, median in zip(sides, times, medians, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joint", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["embedded", "20m", "135m", "0.5b"], choices=list(SHAPES))
    add("--kinds", nargs="+", default=["float32", "bfloat16", "nf4"])
    add("--cells", nargs="+", type=int, default=[1, 2, 4, 8])
    add("--rows", nargs="+", type=int, default=[4, 16], help="rows of a step")
    add("--steps", type=int, default=6)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    for shape in options.shapes:
        for kind in options.kinds:
            for rows in options.rows:
                found += measure(shape, kind, options.cells, rows, options.steps, options.device)
                for one in found[-len(options.cells) :]:
                    print(json.dumps(one), flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    path = options.out / f"{when[:10]}-joint.json"
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    content = {"when": when, "device": device, "measured": found}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
