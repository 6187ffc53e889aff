"""Sealed checkpoints: a run killed at any moment goes on from the newest whole one, bit for bit.

Everything else a step depends on (row order, dropout, learning rate) is a function of the step
number, so weights, optimizer moments and the number are all there is to save.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from backfire.store import CHECKPOINTS, SEAL, intact, read_json, seal, write_json

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun

KEEP = 2


def save(run: TrainingRun) -> None:
    """Write `<folder>/checkpoints/<step>`; the seal comes last. Keeps the newest two."""
    root = run.folder / CHECKPOINTS
    partial = root / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: p.detach().contiguous() for name, p in run.trainable.items()},
        str(partial / "weights.safetensors"),
    )
    torch.save(run.optimizer.state_dict(), partial / "optimizer.pt")
    torch.save([hook.state() for hook in run.hooks], partial / "guards.pt")
    write_json(
        partial / "state.json",
        {
            **{"step": run.step, "log": run.log, "counts": run.counts, "name": run.name},
            "seconds": run.seconds,
        },
    )
    seal(partial)
    final = root / f"{run.step:08d}"
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in _newest(root)[KEEP:]:
        shutil.rmtree(old)


def restore(run: TrainingRun, say: Callable[[str], None]) -> bool:
    """Bring the run to its newest whole checkpoint; damaged ones are put aside and named."""
    for folder in _newest(run.folder / CHECKPOINTS):
        if not intact(folder):
            say(f"The checkpoint of step {int(folder.name)} is damaged and put aside.")
            _put_aside(folder, "damaged")
            continue
        state: dict[str, Any] = read_json(folder / "state.json")
        if state["name"] != run.name:
            say(f"The checkpoint in {folder} is of another run ({state['name']}) and is not used.")
            _put_aside(folder, "other")
            continue
        weights = load_file(str(folder / "weights.safetensors"))
        with torch.no_grad():
            for name, parameter in run.trainable.items():
                parameter.copy_(weights[name])
        # Both bring what they load to where the weights are, whatever device it was saved from.
        run.optimizer.load_state_dict(_loaded(folder / "optimizer.pt"))
        states = _loaded(folder / "guards.pt")
        for hook, kept in zip(run.hooks, states, strict=True):
            hook.load(kept)
        run.go_to(state["step"], state["log"], state["counts"])
        run.seconds = state.get("seconds", 0.0)
        return True
    return False


def _loaded(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _put_aside(folder: Path, why: str) -> None:
    """Out of the way of `_newest`, or `save` would keep it rather than a younger run's own."""
    aside = folder.with_name(f"{why}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _newest(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(
        (p for p in root.iterdir() if p.name.isdigit() and (p / SEAL).is_file()), reverse=True
    )
