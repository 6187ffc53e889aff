"""What a recipe leaves to the hub and to the device, settled once for the whole run.

A cell whose keys say `main` or `auto` could be one thing today and another tomorrow, or one on a
laptop and another on a GPU. Torch is only asked where there may be a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from backfire.experiment import Experiment, Model
from backfire.launch.local import has_gpu
from backfire.model.source import pin
from backfire.recipe import Recipe


class Types(NamedTuple):
    """What `auto` comes to on a device."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    compute: Literal["float32", "bfloat16"]


def pinned(recipe: Recipe, *, ask: bool = True) -> Recipe:
    """The recipe with every hub model at the commit that its revision names now; unless the hub may
    be asked, at the one that was downloaded last, if any.

    Raises:
        UserError: a model is missing, gated or unreachable.
    """
    found: dict[str, Model] = {}
    cells = []
    for cell in recipe.cells:
        name = str(cell.model.spec())
        found[name] = found[name] if name in found else pin(cell.model, ask=ask)
        cells.append(cell.model_copy(update={"model": found[name]}))
    return replace(recipe, cells=tuple(cells))


def settled(recipe: Recipe, types: Types) -> Recipe:
    """The recipe with every `auto` type as it comes to be on this device."""
    return replace(recipe, cells=tuple(_settled(cell, types) for cell in recipe.cells))


def _settled(cell: Experiment, types: Types) -> Experiment:
    part = cell.align
    train = {"compute": types.compute} if cell.train.compute == "auto" else {}
    changes = {
        "model": _typed(cell.model, types),
        "train": cell.train.model_copy(update=train),
        "method": cell.method.settled(types.device),
    }
    if part:
        aligning = {"compute": types.compute} if part.train.compute == "auto" else {}
        changes["align"] = part.model_copy(
            update={
                "train": part.train.model_copy(update=aligning),
                "method": part.method.settled(types.device),
            }
        )
    return cell.model_copy(update=changes)


def _typed(model: Model, types: Types) -> Model:
    return model.model_copy(update={"dtype": types.dtype}) if model.dtype == "auto" else model


def types_of(device: str) -> Types:
    """What `auto` comes to on `auto`, `cpu`, `cuda`, `cuda:1` ...

    Raises:
        UserError: this machine lacks the device.
    """
    if device == "cpu" or (device == "auto" and not _may_have_gpu()):
        return Types("cpu", "float32", "bfloat16" if _has_avx512_bf16() else "float32")
    from backfire.model.load import device_of, dtype_of
    from backfire.train.precision import compute_type

    found = device_of(device)
    kind: Literal["cpu", "cuda"] = "cuda" if found.type == "cuda" else "cpu"
    wide = dtype_of(Model(), found).itemsize == 4
    return Types(kind, "float32" if wide else "bfloat16", compute_type("auto", found))


def types_expected() -> Types:
    """The same, guessed without torch: any GPU is taken for one that multiplies in bfloat16, as all
    since 2020 do. For what is only shown."""
    return Types("cuda", "bfloat16", "bfloat16") if has_gpu() else types_of("cpu")


def _may_have_gpu() -> bool:
    return has_gpu() or Path("/dev/kfd").exists()  # NVIDIA's, or AMD's


def _has_avx512_bf16() -> bool:
    """As `torch.cpu` says it of this machine, from the same flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux, and of Apple's none has it
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split()
