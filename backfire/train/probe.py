"""A short tuning on rows, to see how a model learns them; nothing of it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from backfire.base import Rendered
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
from backfire.train.probe_settings import METHOD, settings


def probe(
    model: PreTrainedModel,
    items: Sequence[Rendered],
    num_weights: int | None,
    progress: Progress = silent,
) -> PreTrainedModel:
    """The model with a LoRA adapter of rank 8 that was tuned on these rows for one pass, or more
    if that is less than 20 steps, by our own loop. `num_weights` decides the learning rate.

    Raises:
        UserError: an adapter cannot be attached to it.
        CellError: see `train.loop.train`.
    """
    method = build("methods", METHOD)
    adapted: PreTrainedModel = method.attach(exact_attention(model), 0)
    device = model.device
    precision = Precision(device, compute_type("auto", device))
    if precision.compute != "float32":
        disable_adapter_casts(adapted)
    with TemporaryDirectory(prefix="backfire-probe-") as folder:
        run = TrainingRun(
            adapted,
            items,
            settings(len(items)),
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
