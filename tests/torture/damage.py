"""Damaged checkpoints: detected, and training goes on from the one before."""

from __future__ import annotations

import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from backfire.base import Rendered
from tests.helpers.loop import fresh, rendered
from tests.helpers.training import Kill, killed_at, run, weights
from tests.torture.row import Figures, Ground, row

FILES = ("weights.safetensors", "optimizer.pt", "guards.pt", "state.json", "done.json")
STEP = 7  # of the newest checkpoint; the one before is of step 6


def cut(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: min(len(data) - 1, round(len(data) * share))])

    return damage


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"cut at {share:.0%}": cut(share) for share in (0, 0.25, 0.5, 0.75, 1)},
    "deleted": Path.unlink,
    "zeros": zero,
    "bit": flip,
}
CASES = [(method, name, kind) for method in ("lora", "full") for name in FILES for kind in DAMAGES]


@row(
    "Each file of the newest checkpoint is cut at five places, deleted, filled with zeros, or has "
    "a bit flipped, for LoRA and full tuning; training resumes and its weights are compared with "
    "those of an uninterrupted run.",
    full=len(CASES),
    small=len(CASES) // 2,
    zero=("undetected", "tracebacks", "other_weights"),
    some=("from_the_one_before",),
)
def checkpoint_damage(count: int, ground: Ground) -> Figures:
    items, found = rendered(ground.tiny), Counter[str]()
    expected, killed = {}, {}
    for method in dict.fromkeys(method for method, _, _ in CASES[:count]):
        whole = fresh(ground.tiny, items, ground.root / f"whole-{method}", method)
        run(whole)
        expected[method] = weights(whole.model)
        killed[method] = ground.root / f"killed-{method}"
        try:
            stopped = fresh(ground.tiny, items, killed[method], method)
            run(stopped, checkpoint_seconds=0, progress=killed_at(STEP + 1))
        except Kill:
            pass
    for number, (method, name, kind) in enumerate(CASES[:count]):
        folder = shutil.copytree(killed[method], ground.root / str(number))
        DAMAGES[kind](folder / f"checkpoints/{STEP:08d}" / name)
        try:
            found += _resumed(ground.tiny, items, folder, method, expected[method])
        except Exception:
            traceback.print_exc()
            found["tracebacks"] += 1
        shutil.rmtree(folder)
    names = ("from_the_one_before", "undetected", "tracebacks", "other_weights")
    return {name: found[name] for name in names}


def _resumed(
    tiny: Path, items: list[Rendered], folder: Path, method: str, expected: dict[str, torch.Tensor]
) -> Counter[str]:
    """What a run that goes on in this folder did."""
    messages, steps = list[str](), list[int]()

    def progress(done: int, total: int, text: str) -> None:
        if total > 1:
            steps.append(done)
        else:
            messages.append(text)

    cell = fresh(tiny, items, folder, method)
    run(cell, progress=progress)
    # A checkpoint without a seal was never finished: there is nothing to say about it.
    seal = folder / f"checkpoints/{STEP:08d}" / "done.json"
    damaged = [f"The checkpoint of step {STEP} is damaged; ignoring it."]
    detected = messages == damaged or (not messages and not seal.exists())
    same = all(torch.equal(weight, expected[name]) for name, weight in weights(cell.model).items())
    return Counter(
        undetected=not detected or steps[0] > STEP,
        from_the_one_before=steps[0] == STEP,
        other_weights=not same,
    )
