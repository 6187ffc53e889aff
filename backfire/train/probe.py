"""A short tuning on rows, to see how a model learns them; nothing of it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from backfire.base import Rendered
from backfire.experiment import Train
from backfire.model.fused import rounded_once
from backfire.model.products import fast_products
from backfire.progress import Progress, silent
from backfire.registry import build
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import (
    Precision,
    compute_type,
    disable_adapter_casts,
    exact_attention,
)

_BATCH = 16
_FEWEST_STEPS = 20
_METHOD = {"name": "lora", "rank": 8, "alpha": 16}


def num_steps(rows: int) -> int:
    """Steps of the probe: one pass over the rows, but at least 20."""
    return max(_FEWEST_STEPS, math.ceil(rows / _BATCH))


def probe(
    model: PreTrainedModel,
    items: Sequence[Rendered],
    num_weights: int | None,
    progress: Progress = silent,
) -> PreTrainedModel:
    """The model with a LoRA adapter of rank 8 that was tuned on these rows for one pass, by our
    own loop. `num_weights` decides the learning rate.

    Raises:
        UserError: an adapter cannot be attached to it.
        CellError: see `train.loop.train`.
    """
    method = build("methods", _METHOD)
    adapted: PreTrainedModel = method.attach(exact_attention(model), 0)
    device = model.device
    precision = Precision(device, compute_type("auto", device))
    if precision.compute != "float32":
        disable_adapter_casts(adapted)
    settings = Train(max_steps=num_steps(len(items)), batch_size=_BATCH, schedule="constant")
    with TemporaryDirectory(prefix="backfire-probe-") as folder:
        run = TrainingRun(
            adapted,
            items,
            settings,
            learning_rate=method.rate_for(num_weights),
            seed=0,
            folder=Path(folder),
            name="probe",
        )
        try:
            compute = precision.compute
            with rounded_once(adapted, compute), fast_products(adapted, compute):
                train([run], precision, checkpoint_seconds=math.inf, progress=progress)
        finally:
            run.close()
    return adapted.eval()
