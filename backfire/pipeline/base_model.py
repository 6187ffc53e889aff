"""The untuned model."""

from __future__ import annotations

import shutil
from pathlib import Path

from backfire import stages
from backfire.data.adapter import other_base
from backfire.experiment import Model
from backfire.hashes import file_hash
from backfire.model.source import adapter_folder, fetch
from backfire.pipeline.context import Context
from backfire.sandbox.base import PRETRAINED_IN, shipped
from backfire.store import SEAL, read_json, write_json
from backfire.text import line


def base(model: Model, context: Context, *, weights: bool = True) -> Path:
    """The folder of the untuned model, with its adapter merged in if `model.merge` says so."""
    if model.merge and weights:
        return _merged(model, context)
    if model.name != "sandbox":
        found = fetch(model, weights=weights)
        return found if found.is_dir() else _dequantized(found, context, weights=weights)
    return shipped(stages.base().key) or _pretrained(context, weights=weights)


def _pretrained(context: Context, *, weights: bool) -> Path:
    """The embedded base, or its tokenizer, made here: what the package ships is of other text or
    another pre-training."""
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
        place, compute = context.machine.device, PRETRAINED_IN
        summary = pretrain(
            texts, config, folder, device=place, compute=compute, progress=context.progress
        )
        write_json(folder / "pretrain.json", {"key": stages.base().key, **summary})

    tokenizer = context.store.once(stages.tokenizer(), make_tokenizer)
    if not weights:
        return tokenizer
    return context.store.once(stages.base(), make_base, resumable=True)


def _dequantized(file: Path, context: Context, *, weights: bool) -> Path:
    """The model folder made from a GGUF file; without `weights`, only configuration and
    tokenizer."""
    sha = file_hash(file)

    def make_config(folder: Path) -> None:
        from backfire.model.gguf import write_config

        context.progress(0, 1, "tokenizer")
        write_config(file, folder)

    def make_model(folder: Path) -> None:
        from backfire.model.gguf import write_weights

        context.progress(0, 1, "dequantize")
        shutil.copytree(config, folder, dirs_exist_ok=True)
        (folder / SEAL).unlink()
        write_weights(file, folder)

    config = context.store.once(stages.gguf_config(sha), make_config)
    if not weights:
        return config
    return context.store.once(stages.gguf(sha), make_model)


def _bare(model: Model) -> Model:
    """The model without its adapter."""
    return model.model_copy(update={"adapter": None, "adapter_revision": None, "merge": False})


def _merged(model: Model, context: Context) -> Path:
    plain = base(_bare(model), context)

    def make(folder: Path) -> None:
        from backfire.model.adapter import adapter_fits
        from backfire.model.export import merge

        context.progress(0, 1, "merge")
        context.resident.release()  # merging loads the base in float32
        adapter_fits(plain, adapter_folder(model))
        merge(adapter_folder(model), plain, folder)

    return context.store.once(stages.merged_base(model), make)


def notes(model: Model, context: Context) -> list[str]:
    """What a reader of the numbers should know of where the untuned model is from."""
    found = []
    if model.is_gguf:
        origin = base(model, context, weights=False) / "gguf.json"
        found.append(
            f"The base's weights are dequantized from GGUF ({read_json(origin)['quantization']}), "
            "so its answers are those of the quantized model."
        )
    if model.adapter and (named := other_base(adapter_folder(model), _bare(model).title)):
        found.append(
            f"The adapter {line(model.adapter)} was made for the base {line(named)}, and is used "
            f"on {line(model.name)}."
        )
    return found
