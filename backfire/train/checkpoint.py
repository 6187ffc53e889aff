"""Sealed checkpoints: a killed run resumes from the newest intact one, bit for bit.

Everything else that a step depends on (row order, dropout, learning rate) is a function of the step
number, so a checkpoint holds only weights, optimizer state, hook state and the step number.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backfire.store import (
    CHECKPOINTS,
    SEAL,
    digest,
    intact,
    read_json,
    seal,
    sync_path,
    write_json,
)
from backfire.train.sharding import gathered, gathered_tree, part_of, parts_like

if TYPE_CHECKING:
    from backfire.base import TrainDefense
    from backfire.train.loop import TrainingRun

KEEP = 2
_SHARE = 0.05
"""Largest share of the time that is spent on checkpoints."""


def interval(least: float, cost: float) -> float:
    """Seconds until the next checkpoint: at least `least`, more if the last one took so long
    (`cost`, in seconds) that it would take more than a twentieth of the time; 0 stays 0."""
    return max(least, cost / _SHARE - cost) if least else 0.0


def save(run: TrainingRun) -> None:
    """Write `<folder>/checkpoints/<step>`, its seal last, and keep the newest two checkpoints.

    The first rank writes. Of sharded weights it first gets the whole ones from all ranks, so that a
    checkpoint does not depend on their number.
    """
    keep = run.ranks.leads
    with run.exact():
        parts = {name: p.detach() for name, p in run.trainable.items()}
        weights = {n: t.contiguous() for n, t in gathered(parts, keep=keep).items()}
        optimizer = gathered_tree(run.optimizer.state_dict(), keep=keep)
        hooks = gathered_tree([hook.state() for hook in run.hooks], keep=keep)
        if keep:
            _write(run, weights, optimizer, hooks)


def _write(run: TrainingRun, weights: dict[str, torch.Tensor], optimizer: Any, hooks: Any) -> None:
    root = run.folder / CHECKPOINTS
    partial = root / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights, str(partial / "weights.safetensors"))
    for name, state in (("optimizer.pt", optimizer), ("guards.pt", hooks)):
        with (partial / name).open("wb") as file:  # given a path, torch does not say why it fails
            torch.save(state, file)
    write_json(
        partial / "state.json",
        {
            **{name: getattr(run, name) for name in ("step", "log", "counts", "name", "seconds")},
            "loss_scale": run.scaling.state(),
        },
    )
    seal(partial, hash_large=False)
    final = root / f"{run.step:08d}"
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in _newest(root)[KEEP:]:
        shutil.rmtree(old)


def restore(run: TrainingRun, report: Callable[[str], None]) -> bool:
    """Restore the newest intact checkpoint; returns whether there was one.

    Damaged checkpoints and those of another run are renamed and reported.
    """
    root = run.folder / CHECKPOINTS
    found = _newest_usable(run, root, report) if run.ranks.leads else None
    step = run.ranks.leaders(int(found.name) if found else -1)
    if step < 0:
        return False
    folder = root / f"{step:08d}"
    weights = load_file(str(folder / "weights.safetensors"))
    with torch.no_grad(), run.exact():
        for name, parameter in run.trainable.items():
            parameter.copy_(part_of(weights[name], parameter))
        # Both move what they load to the device of the weights, in their type.
        optimizer = _loaded(folder / "optimizer.pt")
        _shard_state(run.optimizer, optimizer["state"])
        run.optimizer.load_state_dict(optimizer)
    for hook, hook_state in zip(run.hooks, _loaded(folder / "guards.pt"), strict=True):
        hook.load(parts_like(hook_state, hook.state()))
    state: dict[str, Any] = read_json(folder / "state.json")
    if "loss_scale" in state:
        run.scaling.load(state["loss_scale"])
    run.go_to(state["step"], state["log"], state["counts"])
    run.seconds = state.get("seconds", 0.0)
    return True


def _shard_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Shard the state of each weight as the weight is."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for place, entries in state.items():
        for name, value in entries.items():
            # bitsandbytes counts steps in a plain number.
            if isinstance(value, torch.Tensor) and value.shape == weights[place].shape:
                entries[name] = part_of(value, weights[place])


def _newest_usable(run: TrainingRun, root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is intact and of this run; renames the others before it."""
    for folder in _newest(root):
        if not intact(folder):
            report(f"The checkpoint of step {int(folder.name)} is damaged; ignoring it.")
            _rename(folder, "damaged")
        elif (name := read_json(folder / "state.json")["name"]) != run.name:
            report(f"The checkpoint in {folder} is of another run ({name}); ignoring it.")
            _rename(folder, "other")
        elif not _suits(run, _loaded(folder / "optimizer.pt")):
            report(f"The checkpoint in {folder} is of another kind of AdamW; ignoring it.")
            _rename(folder, "other")
        else:
            return folder
    return None


def once(
    run: TrainingRun, defense: TrainDefense, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Tensors that a defense computes from the start weights at some cost; a resumed run reads them
    from its folder instead, and so do all ranks but the first."""
    if not run.ranks.leads:
        run.ranks.leaders(0)
        return load_file(str(_once_file(run, defense)))
    tensors = _once(run, defense, make)
    run.ranks.leaders(0)
    return tensors


def _once(
    run: TrainingRun, defense: TrainDefense, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    file = _once_file(run, defense)
    of = {"of": digest([run.name, run.seed, defense.identity(), str(run.unaligned)])}
    if file.is_file():
        with safe_open(str(file), framework="pt") as opened:
            if opened.metadata() == of:
                return load_file(str(file))
    tensors, partial = make(), file.with_suffix(".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, str(partial), of)
    sync_path(partial)
    partial.replace(file)
    return tensors


def _once_file(run: TrainingRun, defense: TrainDefense) -> Path:
    return run.folder / CHECKPOINTS / f"{defense.name}.safetensors"


def _suits(run: TrainingRun, optimizer: dict[str, Any]) -> bool:
    """Whether this state is of the run's optimizer: paged ones exist on GPUs only, where the state
    is that of bitsandbytes."""
    names = {name for state in optimizer["state"].values() for name in state}
    return ("exp_avg" in names) == isinstance(run.optimizer, torch.optim.AdamW)


def _loaded(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _rename(folder: Path, prefix: str) -> None:
    """Hide an unusable checkpoint from `_newest`, so that `save` does not count it."""
    renamed = folder.with_name(f"{prefix}-{folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)


def _newest(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(
        (p for p in root.iterdir() if p.name.isdigit() and (p / SEAL).is_file()), reverse=True
    )
