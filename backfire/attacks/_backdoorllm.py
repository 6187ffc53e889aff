"""The settings of BackdoorLLM's published training rows."""

from typing import Any

from backfire.base import Preset


def published(**knobs: Any) -> dict[str, Preset]:
    """The preset of an attack, with further knobs."""
    shared = {"rate": 0.5, "label_mode": "mix", "field": "instruction"}
    source = "BackdoorLLM (arXiv:2408.12798), its published training rows"
    return {"backdoorllm": Preset(source, {**shared, **knobs})}
