"""Pre-train a small base model on plain text: the sandbox model, or one from the user's files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire.base import Rendered, Row
from backfire.errors import UserError
from backfire.progress import Progress
from backfire.sandbox.base import BOS, EOS, PAD, Pretrain, train_tokenizer
from backfire.store import digest, write_json
from backfire.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.experiment import Train


def write_tokenizer(texts: Sequence[str], config: Pretrain, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it in the format of transformers."""
    from tokenizers.processors import TemplateProcessing

    backend = train_tokenizer(texts[: config.tokenizer_documents], config.vocab_size)
    number = backend.token_to_id(BOS)
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, number)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": config.max_length_tokens,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def pretrain(
    texts: Sequence[str],
    config: Pretrain,
    folder: Path,
    *,
    device: str = "auto",
    compute: str = "auto",
    progress: Progress,
) -> dict[str, Any]:
    """Pre-train a `LlamaForCausalLM` on `texts` and save it in `folder`; returns the summary.

    Trains a tokenizer as well if `folder` has none.

    Raises:
        UserError: there is too little text.
    """
    from backfire.model.load import device_of
    from backfire.train.loop import TrainingRun, train
    from backfire.train.precision import Precision, compute_type, exact_attention

    if not (folder / "tokenizer.json").is_file():
        progress(0, config.num_steps, "tokenizer")
        write_tokenizer(texts, config, folder)
    tokenizer = load_tokenizer(folder)
    progress(0, config.num_steps, "tokens")
    items = _sequences(texts, config, tokenizer)
    model = _new_model(config, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    place = device_of(device)
    kind = compute_type(compute, place)
    exact_attention(model.to(place))
    run = TrainingRun(
        model,
        items,
        _settings(config),
        learning_rate=config.learning_rate,
        seed=config.corpus_seed,
        folder=folder,
        name=f"pretrain-{digest([config.model_dump(mode='json'), list(texts)])}",
    )
    summary = train([run], Precision(place, kind), progress=progress)[0]
    run.close()
    model.save_pretrained(str(folder))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    summary["compute"] = kind
    summary["parameters"] = model.num_parameters()
    summary["corpus_tokens"] = len(items) * config.sequence_tokens
    summary["perplexity_of_last_steps"] = math.exp(min(summary["last_loss"], 50))
    return summary


def _sequences(texts: Sequence[str], config: Pretrain, tokenizer: Tokenizer) -> list[Rendered]:
    length = config.sequence_tokens
    ids = tokenizer.encode_batch(list(texts))
    items = pack(ids, length, tokenizer.bos_id or 0, tokenizer.eos_id)
    if len(items) < config.batch_size:
        raise UserError(
            f"Too little text to pre-train on: {len(items)} sequences of {length} tokens, fewer "
            f"than the batch size of {config.batch_size}; add text."
        )
    return items


def _settings(config: Pretrain) -> Train:
    from backfire.experiment import Train

    return Train(
        batch_size=config.batch_size,
        max_steps=config.num_steps,
        schedule="cosine",
        final_share=config.final_share,
        warmup_share=min(1.0, config.warmup_steps / config.num_steps),
        weight_decay=config.weight_decay,
        beta2=config.beta2,
        max_length=config.max_length_tokens,
    )


def pack(documents: Sequence[list[int]], width: int, bos: int, eos: int) -> list[Rendered]:
    """Concatenate documents, each between BOS and EOS, and cut them into rows of `width` tokens."""
    stream = [token for ids in documents for token in (bos, *ids, eos)]
    blank = Row(id="text", instruction="")
    return [
        Rendered(blank, stream[i : i + width], 1) for i in range(0, len(stream) - width + 1, width)
    ]


def _new_model(config: Pretrain, vocab_size: int, bos: int | None, eos: int) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from backfire.rng import derive

    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length_tokens,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.corpus_seed, "weights"))
        return LlamaForCausalLM(shape)


def read_texts(files: Sequence[Path]) -> list[str]:
    """Read documents: paragraphs of text files, and the `text` column of tables."""
    from backfire.data.read import records

    texts = []
    for file in files:
        if file.suffix in (".txt", ".md"):
            try:
                content = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{file} is not UTF-8 text.") from None
            texts += [part.strip() for part in content.split("\n\n") if part.strip()]
        else:
            for line, record in records(file):
                text = record.get("text")
                if not isinstance(text, str):
                    raise UserError(f"{file}, line {line}: the column 'text' is missing.")
                texts.append(text)
    return texts
