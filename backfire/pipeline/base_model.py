"""The untuned model."""

from __future__ import annotations

import shutil
from pathlib import Path

from backfire import stages
from backfire.experiment import Model
from backfire.model.source import fetch
from backfire.pipeline.context import Context
from backfire.store import SEAL, write_json


def base(model: Model, context: Context, *, weights: bool = True) -> Path:
    """The folder of the untuned model; the embedded one is pre-trained on first use."""
    if model.name != "sandbox":
        return fetch(model, weights=weights)
    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.corpus import corpus
    from backfire.train.pretrain import pretrain, write_tokenizer

    config = Pretrain()

    def make_tokenizer(folder: Path) -> None:
        context.progress(0, 1, "tokenizer")
        write_tokenizer(corpus(config.corpus_seed, config.tokenizer_documents), config, folder)

    def make_base(folder: Path) -> None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        (folder / SEAL).unlink()
        texts = corpus(config.corpus_seed, config.num_documents)
        summary = pretrain(
            texts, config, folder, device=context.machine.device, progress=context.progress
        )
        write_json(folder / "pretrain.json", summary)

    tokenizer = context.store.once(stages.tokenizer(), make_tokenizer)
    if not weights:
        return tokenizer
    return context.store.once(stages.base(), make_base, resumable=True)
