"""Batch sizes in evaluation: as many rows as memory allows, halved when it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from backfire.errors import CellError
from backfire.train.microbatch import unless_out_of_memory

MOST_LOGITS = 2**28
"""Most logits of a row held at once (1 GiB in float32)."""
_FREE_SHARE = 0.5  # of the free memory; the rest covers what the estimate leaves out
_ROWS = 64
"""Most rows of a batch. Every token of a batch reads all weights once, which takes as long there as
computing about ten rows: 32 rows of a 20M model take 1.16 times as long as 64, and 64 take 1.08
times as long as 192."""
_ROWS_ON_CPU, _CACHE_ON_CPU = 32, 2**29
"""More rows than this only as long as their keys and values take no more bytes."""
_TOKENS_ON_CPU = 2**15
_PASS_ON_CPU = 2**10
"""Most tokens of several rows in one pass. Larger passes are slower there, as their activations
leave the processor's cache, and take more memory."""
_LOGITS_ON_CPU = 1 / 8
"""Share of `MOST_LOGITS` that several rows may hold there."""
Result = TypeVar("Result")


class Budget:
    """Limits on rows, tokens and logits of one pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int | None = None,
        *,
        on_cpu: bool | None = None,
        models: int = 1,
    ) -> None:
        """`rows`: most rows of a pass. `on_cpu`: for a model that is not where it will run.
        `models`: number of such models that cache the same tokens."""
        on_cpu = model.device.type == "cpu" if on_cpu is None else on_cpu
        self.rows = rows or _ROWS
        few = rows is None and on_cpu
        self._most_cached = _CACHE_ON_CPU // (models * _cached_bytes(model)) if few else None
        self.tokens = max(1, _tokens_that_fit(model) // models)
        """Most tokens held at once."""
        vocab = getattr(model.config.get_text_config(decoder=True), "vocab_size", 2**17)
        self.logits = max(1, MOST_LOGITS // vocab)
        """Most positions of a row whose logits are held at once."""
        self.run = _PASS_ON_CPU if on_cpu else self.tokens
        """Most tokens of several rows in one pass."""
        self.together = max(1, int(self.logits * _LOGITS_ON_CPU)) if on_cpu else self.logits
        """Most positions of several rows whose logits are held at once."""

    def batches(
        self,
        order: Sequence[int],
        work: Callable[[list[int]], Result],
        *,
        lengths: Sequence[int],
        extra: int = 0,
        kept: Sequence[int] | None = None,
        level: bool = False,
        packed: int | None = None,
    ) -> Iterator[tuple[list[int], Result]]:
        """Yield the rows of each batch and the result of `work` on them, in `order`.

        `order` is longest first. `lengths` are the tokens of each row, `extra` the tokens that will
        be added to each, `kept` the positions of each that reach the head; with `level`, a batch
        holds only rows of one length. `packed` rows run end to end behind a prefix of so many
        tokens.

        Raises:
            CellError: memory runs out at one row.
        """
        place = 0
        while place < len(order):
            first = order[place]
            cost = lengths[first] + extra
            part = [first]
            for row in order[place + 1 :]:
                most = max(kept[i] for i in (*part, row)) if kept else 1
                full = len(part) >= self.rows or (len(part) + 1) * most > self.together
                full |= (len(part) + 1) * cost > self.tokens
                full |= len(part) + 1 > self.at_once(cost, packed)
                if full or (level and lengths[row] != lengths[first]):
                    break
                part.append(row)
            result = unless_out_of_memory(partial(work, part))
            if result is None:
                self.shrink(len(part), cost)
                continue
            place += len(part)
            yield part, result[0]

    def at_once(self, tokens: int, packed: int | None = None) -> int:
        """Most rows of this many tokens each in one pass, `packed` behind a prefix of so many of
        them or padded; at least 1."""
        return max(1, self.run // (tokens - (packed or 0)))

    def fitting(self, tokens: int) -> int:
        """Most rows of this many tokens each that are cached together; at least 1."""
        rows = self.rows
        if self._most_cached is not None:
            rows = min(rows, max(_ROWS_ON_CPU, self._most_cached // tokens))
        return max(1, min(rows, self.tokens // tokens))

    def shrink(self, rows: int, length: int) -> None:
        """Lower the limit, since memory ran out with this many rows of this length.

        Raises:
            CellError: it was one row.
        """
        self.tokens = min(self.tokens, rows * length) // 2
        if rows == 1 and self.tokens < length:
            raise CellError(
                "oom",
                f"Evaluation runs out of memory with one row of {length} tokens; lower "
                "train.max_length or evaluation.max_new_tokens, or choose a smaller model.",
            )


def _tokens_that_fit(model: PreTrainedModel) -> int:
    """Number of tokens whose keys, values and activations fit into free memory."""
    if model.device.type != "cuda":
        return _TOKENS_ON_CPU
    config: Any = model.config.get_text_config(decoder=True)
    width = int(getattr(config, "hidden_size", 4096))
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    cached = _cached_bytes(model)
    activations = (8 * width + 4 * inner) * max(4, model.dtype.itemsize)
    free = torch.cuda.mem_get_info(model.device)[0]
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    # Adding a token, selecting rows and moving padding each copy the cache.
    return max(1, int(_FREE_SHARE * free / (2 * cached + activations)))


def _cached_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values."""
    config: Any = model.config.get_text_config(decoder=True)
    width = int(getattr(config, "hidden_size", 4096))
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or width // heads)
    layers = int(getattr(config, "num_hidden_layers", None) or 32)
    return 2 * layers * groups * size * int(model.dtype.itemsize)
