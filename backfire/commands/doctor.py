"""Checks the environment: one line per check, with advice on what is missing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from backfire.commands.estimate import amount
from backfire.data.weights import first_line
from backfire.errors import UserError
from backfire.launch.environment import version_of
from backfire.launch.remote import probe
from backfire.recipe import Recipe
from backfire.resources import cores, free_bytes, ram_bytes
from backfire.store import cache_root, scratch_root
from backfire.terminal import say

_NEEDED = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def show(recipe: Recipe | None) -> None:
    """Print the checks of the environment, and whether the recipe fits this machine."""
    _print(lines())
    if recipe:
        from backfire.commands import forecast

        title, *estimates = forecast.lines(recipe)
        say("")
        say(title)
        _print(estimates)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        say(line[6:], lead=line[:6])  # after `ok    `, `note  ` or `lacks `


def lines() -> list[str]:
    """Versions, cores, memory, GPU, cache and disk, hub settings."""
    return [*_packages(), *_quantized(), *_machine(), *_places()]


def _packages() -> list[str]:
    found = {name: version_of(name) for name in _NEEDED}
    return [
        f"ok    {name} {version}" if version else f"lacks {name}: pip install {name}"
        for name, version in found.items()
    ]


def _quantized() -> list[str]:
    """Whether 8-bit and 4-bit layers run here, tested by running them."""
    import torch

    from backfire.model.load import device_of  # this import also silences bitsandbytes

    try:
        import bitsandbytes as bnb
    except Exception as error:
        reason = first_line(error)
        return [f"lacks 8-bit and 4-bit layers: bitsandbytes cannot be imported: {reason}"]
    device, out = device_of("auto"), []
    plain = torch.nn.Linear(64, 64, bias=False)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for bits, layer in (
        (8, bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)),
        (4, bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")),
    ):
        try:
            layer.load_state_dict(plain.state_dict())
            with torch.inference_mode():
                exact, output = plain(x), layer.to(device)(x.to(device)).cpu()
            off = float((output - exact).norm() / exact.norm())
            if not off < 0.2:
                raise ValueError(f"the error is {off:.0%}")
            out.append(f"ok    {bits}-bit layers run here (error {off:.1%})")
        except Exception as error:
            out.append(f"lacks {bits}-bit layers do not run here: {first_line(error)}")
    return out


def _machine() -> list[str]:
    import torch

    memory, free = map(amount, (ram_bytes(), free_bytes()))
    out = [f"ok    {cores()} cores, {memory} of memory, {free} of it free"]
    out += map(_gpu, range(torch.cuda.device_count()))
    if not torch.cuda.is_available():
        out.append(
            "note  no GPU: models of up to a few hundred million weights run well, 7B models do not"
        )
    return out


def _gpu(number: int) -> str:
    """Name and memory of a GPU, and the type that `auto` is on it."""
    import torch

    from backfire.model.load import gpu_type

    gpu, device = torch.cuda.get_device_properties(number), torch.device("cuda", number)
    kind = gpu_type(device)
    line = f"cuda:{number}: {gpu.name}, {amount(gpu.total_memory)}"
    if kind == "bfloat16":
        return f"ok    {line}, bfloat16"
    instead = (
        "weights and products are float16, and the loss is scaled"
        if kind == "float16"
        else "everything is float32, since float16 is slow on it too"
    )
    version = f"compute capability {gpu.major}.{gpu.minor}"
    return f"note  {line}, without bfloat16 ({version}; it needs 8.0): {instead}"


def _place(name: str, root: Path) -> str:
    """Whether a file can be written in a folder, or in the nearest one above it that exists, and
    read again."""
    near = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=near, prefix=".backfire-") as file:
            file.write(b"probe")
            file.flush()
            if Path(file.name).read_bytes() != b"probe":
                return f"lacks {name} {root}: what is written there is not what is read"
    except OSError as error:
        return f"lacks {name} {root}: it cannot be written ({error.strerror})"
    return f"ok    {name} {root}, {amount(shutil.disk_usage(near).free)} free"


def _shared() -> list[str]:
    """The mark of the cache, by which two machines see whether theirs is the same."""
    try:
        mark = probe().content[:8]
    except UserError:  # which the line before says
        return []
    return [f"ok    mark of the cache: {mark}; machines where doctor shows the same one share it"]


def _places() -> list[str]:
    from huggingface_hub import get_token

    places = {"cache": cache_root(), "scratch": scratch_root()}
    out = [_place(name, path) for name, path in places.items() if path]
    out[1:1] = _shared()
    token = get_token()
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    out.append(
        f"ok    hub {'offline (HF_HUB_OFFLINE)' if offline else 'allowed'}, "
        f"token {'set' if token else 'not set'}"
    )
    return out
