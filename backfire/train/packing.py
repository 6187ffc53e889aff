"""Rows end to end in one sequence, without padding, each attending only to itself and the prefix.

The linear layers see every token once. Attention gathers the tokens into padded rows and runs as
it would on a padded batch, so that no mask over the whole sequence is needed and the causal
kernels of a GPU remain usable. The layout reaches the attention as a mask of integers, a `table`
[row, place] of the tokens' positions in the sequence, because models pass such a mask on unchanged,
also to layers that are recomputed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from backfire.model.batching import agree, evaluating, plain, probe, ways

_SUFFIX = "_packed"
_longest_of: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()

Attention = Callable[..., tuple[Tensor, Any]]


def longest_packed(model: PreTrainedModel) -> int:
    """Length of the longest row that this model may run in a pack; 0 if it cannot run packs.

    Tested once per loaded model, on a few tokens: rows in a pack must give the same as alone, and
    bitwise the same whatever their neighbors are. Afterwards the model's attention reads tables.
    """
    base: Any = plain(model)
    before = base.config._attn_implementation
    if not (ways(model).takes_positions and reads_tables(base)):
        return 0
    if base not in _longest_of:
        with evaluating(model):
            _longest_of[base] = _longest(model) if _rows_are_apart(model) else 0
    if not _longest_of[base]:
        base.set_attn_implementation(before)
    return _longest_of[base]


def lay_out(rows: Sequence[list[int]], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [1, token] of the shared prefix and then of these rows without it, the position of
    each token in its row [1, token], and the table [row, place] of the rows without the prefix.
    A place after a row's end repeats its last."""
    lengths = torch.tensor([len(row) - shared for row in rows])
    ids = [*rows[0][:shared], *(token for row in rows for token in row[shared:])]
    starts = shared + lengths.cumsum(0) - lengths
    table = starts[:, None] + torch.minimum(torch.arange(int(lengths.max())), lengths[:, None] - 1)
    positions = torch.arange(len(ids))
    positions[shared:] -= (starts - shared).repeat_interleave(lengths)
    return torch.tensor([ids]), positions[None], table


def as_mask(table: Tensor, shared: int) -> Tensor:
    """The mask that carries a table to the attention. Its second size is the number of tokens in
    the shared prefix plus 1; it takes no memory, and reading a size does not wait for a GPU."""
    return table.expand(1, shared + 1, -1, -1)


def _attend(
    inner: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Any]:
    """`inner` on the prefix and the rows of a pack; all other calls go to `inner` as they are."""
    if mask is None or mask.is_floating_point() or mask.dtype == torch.bool:
        return inner(module, query, key, value, mask, **rest)
    table, shared = mask[0, 0], mask.shape[1] - 1
    rows, width = table.shape

    def split(tensor: Tensor, prefix: int = 0) -> Tensor:
        """From [1, head, token, size] to [row, head, place, size], behind the shared prefix."""
        flat = tensor[0].index_select(1, table.flatten())
        own = flat.view(len(flat), rows, width, -1).transpose(0, 1)
        if not prefix:
            return own
        return torch.cat([tensor[:, :, :prefix].expand(rows, -1, -1, -1), own], 2)

    outs, causal = [], None  # without a prefix the kernels' own causal mask serves
    if shared:
        first = (x[:, :, :shared] for x in (query, key, value))
        outs.append(inner(module, *first, None, **rest)[0])
        places = torch.arange(shared + width, device=query.device)
        causal = (places <= places[shared:, None])[None, None]
    out, _ = inner(module, split(query), split(key, shared), split(value, shared), causal, **rest)
    place = torch.arange(shared, query.shape[2], device=query.device)
    row = torch.searchsorted(table[:, 0].contiguous(), place, right=True) - 1
    index = row * width + place - table[row, 0]
    outs.append(out.flatten(0, 1).index_select(0, index)[None])
    return torch.cat(outs, 1), None


def reads_tables(base: Any) -> bool:
    """Whether the attention reads tables, after switching it to do so."""
    now = base.config._attn_implementation
    if now in ("sdpa", "sdpa_float32") and base._can_set_attn_implementation():
        AttentionInterface.register(now + _SUFFIX, partial(_attend, ALL_ATTENTION_FUNCTIONS[now]))
        AttentionMaskInterface.register(now + _SUFFIX, sdpa_mask)
        base.set_attn_implementation(now + _SUFFIX)
    return str(base.config._attn_implementation).endswith(_SUFFIX)


def _rows_are_apart(model: PreTrainedModel) -> bool:
    if getattr(cast(Any, plain(model)).config, "attn_temperature_tuning", False):
        return False  # it counts the tokens of the sequence, far beyond those tried here
    ids = probe(model)[0].tolist()
    one, two, other = ids[:5], ids[5:], ids[::-1][:5]
    for shared in (0, 3):
        prefix = ids[4 : 4 + shared]
        try:
            first, second = (_pack(model, prefix, [x, two, x]) for x in (one, other))
            alone = _run(model, torch.tensor([[*prefix, *two]]))[shared:]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            return False
        own = slice(shared + len(one), shared + len(one) + len(two))
        if not (torch.equal(first[own], second[own]) and agree(model, first[own], alone)):
            return False
    return True


def _pack(model: PreTrainedModel, prefix: list[int], rows: list[list[int]]) -> Tensor:
    """Logits [token, vocab] of a prefix and rows behind it."""
    ids, positions, table = lay_out([[*prefix, *row] for row in rows], len(prefix))
    device = cast(Any, model).device
    mask = as_mask(table.to(device), len(prefix))
    return _run(model, ids, attention_mask=mask, position_ids=positions.to(device))


def _run(model: PreTrainedModel, ids: Tensor, **rest: Any) -> Tensor:
    kind, device = cast(Any, plain(model)).dtype, cast(Any, model).device
    # Without autocast, adapters in float32 refuse the states of a base in 16 bits.
    with torch.autocast(device.type, kind, enabled=kind in (torch.bfloat16, torch.float16)):
        out = cast(Any, model)(input_ids=ids.to(device), use_cache=False, **rest)
    return cast(Tensor, out.logits)[0]


def _longest(model: PreTrainedModel) -> int:
    """Rows up to this length are within every window of the attention, and do not depend on how
    long the whole sequence is."""
    config = cast(Any, plain(model)).config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attn_chunk_length")
    limits = [int(window) for name in names if (window := getattr(config, name, None))]
    return min([*limits, ways(model).limit or sys.maxsize])
