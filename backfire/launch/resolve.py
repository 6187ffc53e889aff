"""What a recipe leaves to the hub and to the device, settled once for the whole run.

A cell whose keys say `main` or `auto` could be one thing today and another tomorrow, or one on a
laptop and another on a GPU. Torch is only asked where there may be a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from backfire.experiment import Experiment, Model
from backfire.model.source import pin
from backfire.model.types import Types, has_gpu, types_of_cpu
from backfire.recipe import Recipe


def pinned(recipe: Recipe, *, ask: bool = True) -> Recipe:
    """The recipe with every hub model at the commit that its revision names now; unless the hub may
    be asked, at the one that was downloaded last, if any.

    Raises:
        UserError: a model is missing, gated or unreachable.
    """
    found: dict[str, Model] = {}
    cells = []
    for experiment in recipe.cells:
        name = str(experiment.model.spec())
        found[name] = found[name] if name in found else pin(experiment.model, ask=ask)
        cells.append(experiment.model_copy(update={"model": found[name]}))
    return replace(recipe, cells=tuple(cells))


def settled(recipe: Recipe, types: Types) -> Recipe:
    """The recipe with every `auto` type as it comes to be on this device."""
    return replace(recipe, cells=tuple(_settled(experiment, types) for experiment in recipe.cells))


def _settled(experiment: Experiment, types: Types) -> Experiment:
    part = experiment.align
    train = {"compute": types.compute} if experiment.train.compute == "auto" else {}
    changes = {
        "model": _typed(experiment.model, types),
        "train": experiment.train.model_copy(update=train),
        "method": experiment.method.settled(types.device),
    }
    if part:
        aligning = {"compute": types.compute} if part.train.compute == "auto" else {}
        changes["align"] = part.model_copy(
            update={
                "train": part.train.model_copy(update=aligning),
                "method": part.method.settled(types.device),
            }
        )
    return experiment.model_copy(update=changes)


def _typed(model: Model, types: Types) -> Model:
    return model.model_copy(update={"dtype": types.dtype}) if model.dtype == "auto" else model


def types_of(device: str) -> Types:
    """What `auto` comes to on `auto`, `cpu`, `cuda`, `cuda:1` ...

    Raises:
        UserError: this machine lacks the device.
    """
    none = not has_gpu() and not Path("/dev/kfd").exists()  # NVIDIA's, or AMD's
    if device == "cpu" or (device == "auto" and none):
        return types_of_cpu()
    from backfire.model.load import device_of, dtype_of
    from backfire.train.precision import compute_type

    found = device_of(device)
    wide = dtype_of(Model(), found).itemsize == 4
    return Types(
        "cuda" if found.type == "cuda" else "cpu",
        "float32" if wide else "bfloat16",
        compute_type("auto", found),
    )
