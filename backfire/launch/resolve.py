"""Resolve hub revisions and `auto` types, once for the whole run.

With `main` or `auto` in its key, a cell could have different results tomorrow or on another device.
Torch is imported only if there may be a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from backfire.errors import UserError, shortened
from backfire.experiment import Align, Experiment, Model
from backfire.model.source import pin
from backfire.model.types import Type, Types, types_of_cpu
from backfire.recipe import Recipe
from backfire.resources import has_gpu, named_gpus


def pin_models(recipe: Recipe, *, ask: bool = True) -> Recipe:
    """Return the recipe with every hub model pinned to the current commit of its revision.

    Without `ask` the hub is not contacted: the last downloaded commit is used, if there is one.

    Raises:
        UserError: a model is missing, gated or unreachable.
    """
    pinned: dict[str, Model] = {}
    cells = []
    for experiment in recipe.cells:
        name = str(experiment.model.spec())
        pinned[name] = pinned[name] if name in pinned else pin(experiment.model, ask=ask)
        cells.append(experiment.model_copy(update={"model": pinned[name]}))
    return replace(recipe, cells=tuple(cells))


def resolve_auto(recipe: Recipe, types: Types) -> Recipe:
    """Return the recipe with every `auto` type replaced by the type for this device."""
    return replace(recipe, cells=tuple(_resolve(experiment, types) for experiment in recipe.cells))


def _resolve(experiment: Experiment, types: Types) -> Experiment:
    model, align = experiment.model, experiment.align
    changes: dict[str, Any] = _training(experiment, types)
    if model.dtype == "auto":
        changes["model"] = model.model_copy(update={"dtype": types.dtype})
    if align:
        changes["align"] = align.model_copy(update=_training(align, types))
    return experiment.model_copy(update=changes)


def _training(part: Experiment | Align, types: Types) -> dict[str, Any]:
    compute = {"compute": types.compute} if part.train.compute == "auto" else {}
    train, method = (
        part.train.model_copy(update=compute),
        part.method.resolved(types.device, types.compute),
    )
    return {"train": train, "method": method}


def types_of(device: str) -> Types:
    """Resolve `auto` for a device: `auto`, `cpu`, `cuda`, `cuda:1` ... On a GPU the products of
    training are in the type of the weights.

    Raises:
        UserError: this machine does not have the device.
    """
    if device == "cpu":
        return types_of_cpu()
    _refuse_lost_gpus()
    gpu = has_gpu() or Path("/dev/kfd").exists()  # NVIDIA or AMD
    if device == "auto" and not gpu:
        return types_of_cpu()
    from backfire.model.load import device_of, dtype_of
    from backfire.train.precision import compute_type

    resolved = device_of(device)
    name = str(dtype_of(Model(), resolved)).removeprefix("torch.")
    place: Literal["cpu", "cuda"] = "cuda" if resolved.type == "cuda" else "cpu"
    return Types(place, cast(Type, name), compute_type("auto", resolved))


def _refuse_lost_gpus() -> None:
    """Refuse GPUs that are named and not there: CUDA would ignore the names, and the run would
    silently be on the CPU."""
    if not (names := named_gpus()):
        return
    import torch

    if (count := torch.cuda.device_count()) < len(names):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {shortened(','.join(names))}, and {count} of these GPUs "
            f"{'is' if count == 1 else 'are'} here; correct it, or choose --device cpu."
        )
