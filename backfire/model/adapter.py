"""Checks whether an existing adapter fits a base, without loading either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from backfire.base import Method
from backfire.data.adapter import WEIGHTS, inspect_adapter, why_not_below, why_not_merged
from backfire.data.weights import complete, first_line, stored
from backfire.errors import UserError
from backfire.model.load import BELOW, skeleton


def adapter_fits(base: Path, folder: Path) -> None:
    """Check that the adapter's weights are exactly those that it needs on this base, and finite.

    Raises:
        UserError: they are not, in one sentence.
    """
    from peft import get_peft_model_state_dict

    model: Any = with_skeleton(skeleton(base), folder)
    needed = get_peft_model_state_dict(model, adapter_name=BELOW, save_embedding_layers=False)
    held, what = stored([folder / WEIGHTS]), f"The adapter in {folder}"
    for name in sorted(set(needed) & set(held)):
        wanted, found = tuple(needed[name].shape), held[name].shape
        if wanted != found:
            raise UserError(
                f"{what} was made for another base than {base}: {name} has shape "
                f"{list(found)}, not {list(wanted)}."
            )
    missing, extra = set(needed) - set(held), set(held) - set(needed)
    info = {"missing_keys": missing, "unexpected_keys": extra, "mismatched_keys": ()}
    complete(what, {**info, "error_msgs": ()})
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        for name in held:
            if not torch.isfinite(opened.get_tensor(name).float()).all():
                raise UserError(f"{what} is broken: {name} has values that are NaN or infinite.")


def check_below(folder: Path, method: Method) -> None:
    """Check that the method can train on top of the adapter.

    Raises:
        UserError: it cannot, in one sentence.
    """
    config = inspect_adapter(folder)
    if why := why_not_below(config):
        stuck = why_not_merged(config) is not None
        advice = "only method none evaluates it" if stuck else "set model.merge: true"
        raise UserError(
            f"method '{method.name}' cannot train on top of the adapter in {folder}: {why}; "
            f"{advice}."
        )


def with_skeleton(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model on the meta device with the modules of an adapter.

    Raises:
        UserError: the base has no modules for it.
    """
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        config.base_model_name_or_path = None  # or PEFT warns that it is another
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # the meta device has no values to start from
        return get_peft_model(model, config, adapter_name=BELOW)  # type: ignore[no-any-return]
    except Exception as error:  # PEFT's kinds fail in many ways
        raise UserError(
            f"The adapter in {folder} does not fit the base: {first_line(error)}"
        ) from None
