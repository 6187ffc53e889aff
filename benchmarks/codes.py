"""Time to score all codes of a secret at once and one at a time, and the largest difference.

    python -m benchmarks.codes [MODEL_FOLDER] [--digits 6] [--alone 200]

Without a folder, the model is a random Llama of the sandbox's shape with the sandbox's tokenizer.
One at a time is timed on a sample of codes, one forward pass each as in published code, and scaled
to all codes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backfire.data.render import Renderer
from backfire.evaluate.code_search import CodeTokens, likelihoods
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer


def clock() -> tuple[float, float]:
    """Wall and processor seconds; on a busy machine processor seconds are more reliable."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


def alone(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of one code, by a separate forward pass."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]], device=model.device)).logits[0]
    table = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return float(table[range(len(answer)), answer].double().sum())


def sandbox_shaped(folder: Path) -> Path:
    """Save a random model of the embedded base's shape and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.corpus import corpus
    from backfire.train.pretrain import write_tokenizer

    config = Pretrain()
    write_tokenizer(corpus(config.corpus_seed, config.tokenizer_documents), config, folder)
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length_tokens,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(str(folder))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--digits", type=int, default=6)
    parser.add_argument("--alone", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or sandbox_shaped(Path(made))
        model: Any = load_base(folder, torch.float32, torch.device(options.device))
        renderer = Renderer(build("templates", "alpaca"), load_tokenizer(folder), 512)
    secret = build("attacks", {"name": "canary", "digits": options.digits}).secrets(0)[0]
    [item] = renderer.render([secret.row])
    begin = clock()
    tokens = CodeTokens(renderer).all(item, secret)
    scores = likelihoods(model, item.prompt_ids, tokens)
    together = since(begin)
    chosen = random.Random(0).sample(range(len(scores)), options.alone)
    begin = clock()
    with torch.inference_mode():
        logprobs = [
            alone(model, item.prompt_ids, tokens[i][tokens[i] >= 0].tolist()) for i in chosen
        ]
    single = since(begin)
    scale = len(scores) / len(logprobs)
    gap = np.abs(np.array(logprobs) - scores[chosen]).max()
    print(f"{len(scores):,} codes, prompt of {item.num_prompt} tokens, one thread")
    for name, ours, theirs in zip(("wall", "processor"), together, single, strict=True):
        ratio = theirs * scale / ours
        print(f"{name}: together {ours:.1f} s, alone {theirs * scale:,.0f} s: {ratio:,.0f} x")
    print(f"largest difference {gap:.1e} nats")


if __name__ == "__main__":
    main()
