"""The model of `backfire scan --model`: found, checked against this machine, and named with what it
costs."""

from __future__ import annotations

from typing import Any

from backfire.commands.failure import note
from backfire.errors import UserError
from backfire.experiment import Machine, Model, Train
from backfire.pipeline import Context, base
from backfire.scan.asked import Asked
from backfire.store import Store
from backfire.text import count, duration

_LIBRARIES = 1e9
"""Bytes for libraries and activations beside the weights."""


def find_model(name: str, device: str) -> tuple[Model, Context]:
    """The model by name, with the cache and the device; only its configuration is read.

    Raises:
        UserError: there is no such model or device, or it is not a causal language model.
    """
    from backfire.model.causal import why_not

    model, context = Model.make({"name": name}, "--model"), Context(Store(), Machine(device=device))
    assert context.device  # a device that does not exist is an error now
    if problem := why_not(base(model, context, weights=False)):
        raise UserError(problem)
    return model, context


def asked_of(model: Model, context: Context, limit: int, template: Any = None) -> Asked:
    """The model as it is asked about rows: with this template, a name or a mapping with knobs, else
    with its chat template if it has one, else the plain prompt.

    Raises:
        UserError: its weights are not there, or take more memory than is free.
    """
    from backfire.data.limits import read_limits
    from backfire.data.render import Renderer
    from backfire.evaluate.reference import Reference
    from backfire.model.count import num_weights
    from backfire.model.load import dtype_of
    from backfire.model.resident import Source
    from backfire.registry import build
    from backfire.tokenizer import load_tokenizer

    weights, device = num_weights(model), context.device
    dtype = dtype_of(model, device)
    _check_memory(model, (weights or 0) * dtype.itemsize, device.type)
    folder = base(model, context)
    tokenizer = load_tokenizer(folder)
    default = "chat" if tokenizer.chat_template else "raw"
    limits, longest = read_limits(folder), Train().max_length
    chosen = build("templates", default if template is None else template)
    renderer = Renderer(chosen, tokenizer, longest, limits=limits)

    def tell(rows: int, cut: int, seconds: float) -> None:
        forms = {"chat": "its chat template", "raw": "plain prompts"}
        form = forms.get(chosen.name, f"template {chosen.name}")
        form += " (no chat template)" if template is None and chosen.name == "raw" else ""
        if cut:
            form += f" (of {count(cut, 'row')} the end of the prompt is cut, at {longest} tokens)"
        what, where = count(rows, "row"), device.type
        note(f"{model.short_title} reads {what} with {form}: about {duration(seconds)} on {where}.")

    source = Source(folder, dtype, device)
    reference = Reference(source, renderer, weights, resident=context.resident, tell=tell)
    return Asked(model.short_title, reference, limit)


def _check_memory(model: Model, needed: float, device: str) -> None:
    from backfire.resources import free_bytes

    free = free_bytes()
    if device == "cpu" and needed + _LIBRARIES > free:
        raise UserError(
            f"{model.short_title} takes {needed / 1e9:.1f} GB of memory and {_LIBRARIES / 1e9:.0f} "
            f"GB for the libraries, and {free / 1e9:.1f} GB are free; choose a smaller model, or "
            "a machine with a GPU."
        )
