"""Rows end to end in one sequence, without padding, each attending only to itself and the prefix.

The linear layers see every token once. Attention gathers the tokens into padded rows and runs as
it would on a padded batch, so that no mask over the whole sequence is needed and the causal
kernels of a GPU remain usable; or, on a GPU in 16 bits, the flash kernel takes rows of unequal
length as they are. The layout reaches the attention as a mask of integers, a `table` [row, place]
of the tokens' positions in the sequence, because models pass such a mask on unchanged, also to
layers that are recomputed.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from backfire.errors import is_out_of_memory
from backfire.model.batching import agree, evaluating, plain, probe, ways, windows_of

_SUFFIX = "_packed"
_FLASH = "_varlen"  # transformers takes every name with "flash" for a kernel of its own
_found: WeakKeyDictionary[PreTrainedModel, tuple[str, int]] = WeakKeyDictionary()
"""The kind of attention that reads tables, and the length of the longest row in a pack."""

_UNKNOWN_TO_FLASH = ("softcap", "s_aux", "position_bias")
"""Arguments of an attention that the flash kernel does not take."""

Attention = Callable[..., tuple[Tensor, Any]]


def longest_packed(model: PreTrainedModel) -> int:
    """Length of the longest row that this model may run in a pack; 0 if it cannot run packs.

    Tested once per loaded model, on a few tokens: rows in a pack must give the same as alone, and
    bitwise the same whatever their neighbors are. Afterwards the model's attention reads tables.
    """
    base: Any = plain(model)
    if base not in _found:
        _found[base] = _find(model, base)
    kind, longest = _found[base]
    if longest:
        reads_tables(base, kind)
    return longest


def same_packs(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let a model with the weights of another read what that does."""
    longest_packed(model)
    _found[plain(twin)] = _found[plain(model)]


def _find(model: PreTrainedModel, base: Any) -> tuple[str, int]:
    before = base.config._attn_implementation
    for kind in (_FLASH, "") if _has_flash(base.device) else ("",):
        if not (ways(model).takes_positions and reads_tables(base, kind)):
            break
        with evaluating(model):
            # Calls that the flash kernel does not take go the other way, so both must work.
            if all(_rows_are_apart(model, flash=flash) for flash in {bool(kind), False}):
                return kind, _longest(model)
        base.set_attn_implementation(before)
    return "", 0


def lay_out(rows: Sequence[list[int]], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [1, token] of the shared prefix and then of these rows without it, the position of
    each token in its row [1, token], and the table [row, place] of the rows without the prefix.
    A place after a row's end repeats its last. Such lines may follow one another, each with its
    prefix; their rows are then the groups of one pack."""
    lengths = torch.tensor([len(row) - shared for row in rows])
    ids = [*rows[0][:shared], *(token for row in rows for token in row[shared:])]
    starts = shared + lengths.cumsum(0) - lengths
    table = starts[:, None] + torch.minimum(torch.arange(int(lengths.max())), lengths[:, None] - 1)
    positions = torch.arange(len(ids))
    positions[shared:] -= (starts - shared).repeat_interleave(lengths)
    return torch.tensor([ids]), positions[None], table


def as_mask(table: Tensor, shared: int, groups: int = 1) -> Tensor:
    """The mask that carries a table to the attention. Its first two sizes are the number of groups,
    and of tokens in a prefix plus 1; it takes no memory, and reading a size does not wait for a
    GPU."""
    return table.expand(groups if shared else 1, shared + 1, -1, -1)


@dataclass(frozen=True)
class Plan:
    """Where the tokens of a pack are; made once per pass of the model."""

    groups: int
    """Number of groups of rows. Each has its prefix just before its first row."""
    shared: int
    """Number of tokens in a prefix."""
    tokens: int
    """Number of tokens in the line."""
    table: Tensor
    """[row, place]: the position of each row's tokens in the line."""

    @classmethod
    def of(cls, mask: Tensor, tokens: int) -> Plan:
        """The plan of the mask that carries a table, for a line of so many tokens."""
        if mask not in _plans:  # a view would keep its mask, the key, in memory
            table = mask[0, 0].clone()
            _plans[mask] = cls(mask.shape[0], mask.shape[1] - 1, tokens, table)
        return cast(Plan, _plans[mask])

    @cached_property
    def first(self) -> Tensor:
        """[group]: the first row of each: between it and the row before is a prefix."""
        if self.groups == 1:
            return self.starts.new_zeros(1)
        opens = self.starts[1:] > self.table[:-1, -1] + 1
        return torch.cat([self.starts.new_zeros(1), opens.nonzero()[:, 0] + 1])

    @cached_property
    def sizes(self) -> list[int]:
        """The number of rows in each group."""
        first = self.first.tolist() if self.groups > 1 else [0]
        return [stop - start for start, stop in pairwise([*first, len(self.table)])]

    @cached_property
    def prefixes(self) -> Tensor:
        """[group, shared]: the positions of each group's prefix."""
        start = self.starts[self.first] - self.shared
        return start[:, None] + torch.arange(self.shared, device=self.table.device)

    @cached_property
    def own(self) -> Tensor:
        """[token]: the positions outside of the prefixes."""
        if self.groups == 1:
            return torch.arange(self.shared, self.tokens, device=self.table.device)
        inside = torch.ones(self.tokens, dtype=torch.bool, device=self.table.device)
        inside[self.prefixes.flatten()] = False
        return inside.nonzero()[:, 0]

    @cached_property
    def order(self) -> Tensor | None:
        """[token]: where each token of the line is, if all prefixes come before the other tokens;
        None if they do."""
        return torch.cat([self.prefixes.flatten(), self.own]).argsort() if self.groups > 1 else None

    @cached_property
    def places(self) -> Tensor:
        """[token]: the place of each token outside of the prefixes in the flattened table."""
        row = torch.searchsorted(self.starts, self.own, right=True) - 1
        return row * self.table.shape[1] + self.own - self.starts[row]

    @cached_property
    def keyed(self) -> Tensor:
        """[row, shared + place]: the table, behind the positions of the row's prefix."""
        before = [p.expand(n, -1) for p, n in zip(self.prefixes, self.sizes, strict=True)]
        return torch.cat([torch.cat(before), self.table], 1)

    @cached_property
    def after(self) -> Tensor:
        """[row, place]: whether a place is after its row's end, where it repeats the last."""
        return self.table.diff(dim=1, prepend=self.table[:, :1] - 1) == 0

    @cached_property
    def causal(self) -> Tensor | None:
        """[1, 1, place, shared + place]: whether a place of a row attends to a key. None without a
        prefix: the kernels' own causal mask then serves."""
        keys = torch.arange(self.shared + self.table.shape[1], device=self.table.device)
        return (keys <= keys[self.shared :, None])[None, None] if self.shared else None

    @cached_property
    def starts(self) -> Tensor:
        """[row]: the position of each row's first token in the line."""
        return self.table[:, 0].contiguous()

    @cached_property
    def borders(self) -> tuple[Tensor, Tensor]:
        """Where the prefix and the rows begin and the last ends, in the line [border], and in keys
        that repeat the prefix before each row [border]."""
        first = [0] if self.shared else []
        line = torch.cat([self.starts.new_tensor(first), self.starts])
        line = torch.cat([line, self.starts.new_tensor([self.tokens])])
        before = torch.arange(len(line), device=line.device) - 1  # rows that begin earlier
        return line.int(), (line + self.shared * before.clamp(min=0)).int()

    @cached_property
    def keys(self) -> Tensor:
        """[key]: the positions in the line of keys that repeat the prefix before each row."""
        line, borders = self.borders
        key = torch.arange(self.tokens + self.shared * len(self.table), device=line.device)
        number = torch.searchsorted(borders, key.int(), right=True) - 1
        within = key - borders[number]
        return torch.where(within < self.shared, within, line[number] + within - self.shared)


_plans = WeakTensorKeyDictionary()


def _attend(
    inner: Attention,
    flash: bool,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Any]:
    """Attention within the prefix and the rows of a pack; other calls go to `inner` as they are."""
    if mask is None or mask.is_floating_point() or mask.dtype == torch.bool:
        return inner(module, query, key, value, mask, **rest)
    plan = Plan.of(mask, query.shape[2])
    if flash and (kind := _half(query, **rest)):
        q, k, v = (x[0].transpose(0, 1).to(kind) for x in (query, key, value))
        return _by_flash(q, k, v, plan, rest.get("scaling"))[None], None
    return _by_row(partial(inner, module, **rest), query, key, value, plan), None


def _by_row(inner: Attention, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    """[1, token, head, size]: `inner` on the prefix, and on the rows padded behind it."""
    lines = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    split = [_Split.apply(x, plan, bool(n)) for n, x in enumerate(lines)]  # type: ignore[no-untyped-call]
    prefix, rows = zip(*split, strict=True)
    out = inner(*(x.transpose(1, 2) for x in rows), plan.causal)[0]
    first = prefix[0]
    if plan.shared:
        first = inner(*(x.transpose(1, 2) for x in prefix), None)[0]
    joined: Tensor = _Join.apply(first, out, plan)  # type: ignore[no-untyped-call]
    return joined[None]


class _Split(torch.autograd.Function):
    """From [token, head, size] to the prefixes [group, place, head, size], and to rows [row, place,
    head, size]; those of `keys` have their prefix before them.

    Every token is in one row, so gradients are gathered too, which is much faster than adding them
    one by one, as torch does. Those of the places after a row's end are 0."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, plan: Plan, keys: bool) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.keys = plan, keys
        return _gathered(line, plan.prefixes), _gathered(line, plan.keyed if keys else plan.table)

    @staticmethod
    def backward(ctx: Any, prefix: Tensor, rows: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        plan: Plan = ctx.plan
        if ctx.keys and plan.shared:
            before = torch.split(rows[:, : plan.shared], plan.sizes)
            prefix = prefix + torch.stack([part.sum(0) for part in before])
            rows = rows[:, plan.shared :]
        return _in_line(prefix, rows, plan), None, None


class _Join(torch.autograd.Function):
    """From prefixes [group, place, head, size] and rows [row, place, head, size] to the line of all
    tokens."""

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _in_line(prefix, rows, plan)

    @staticmethod
    def backward(ctx: Any, line: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        plan: Plan = ctx.plan
        rows = _gathered(line, plan.table)
        return (
            _gathered(line, plan.prefixes),
            rows.masked_fill_(plan.after[..., None, None], 0),
            None,
        )


def _gathered(line: Tensor, index: Tensor) -> Tensor:
    """The tokens of a line at these positions."""
    return line.index_select(0, index.flatten()).reshape(*index.shape, *line.shape[1:])


def _in_line(prefix: Tensor, rows: Tensor, plan: Plan) -> Tensor:
    """The line of the tokens of these prefixes and rows."""
    own = rows.flatten(0, 1).index_select(0, plan.places)
    line = torch.cat([prefix.flatten(0, 1), own])
    return line if plan.order is None else line.index_select(0, plan.order)


def _half(query: Tensor, dropout: float = 0.0, **rest: Any) -> torch.dtype | None:
    """The 16-bit type of this call's products; None where the flash kernel must not be used."""
    device = query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    plain_call = not dropout and all(rest.get(name) is None for name in _UNKNOWN_TO_FLASH)
    return kind if plain_call and kind in (torch.bfloat16, torch.float16) else None


def _by_flash(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """[token, head, size], of queries, keys and values of this shape, by torch's flash kernel for
    rows of unequal length."""
    from torch.nn.attention.varlen import varlen_attn

    if plan.shared:
        key, value = (x.index_select(0, plan.keys) for x in (key, value))
    shared, width = plan.shared, plan.table.shape[1]
    out = varlen_attn(
        *(query, key, value, *plan.borders, max(shared, width), shared + width),
        scale=scale,
        window_size=(-1, 0),  # causal, with the last query at the last key
        enable_gqa=query.shape[1] != key.shape[1],
        **_whole(varlen_attn),
    )
    return cast(Tensor, out)


@cache
def _whole(kernel: Attention) -> dict[str, Any]:
    """The arguments with which a row's sums do not depend on its neighbors, where torch has them:
    by itself the kernel splits keys by the longest row of all."""
    return {"num_splits": 1} if "num_splits" in inspect.signature(kernel).parameters else {}


def _has_flash(device: torch.device) -> bool:
    """Whether the flash kernel for rows of unequal length may run on this device."""
    known = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def reads_tables(base: Any, kind: str = "") -> bool:
    """Whether the attention reads tables, after switching it to do so; `kind` is `_FLASH`, or empty
    for that which every device has."""
    now = str(base.config._attn_implementation).removesuffix(_SUFFIX).removesuffix(_FLASH)
    if now in ("sdpa", "sdpa_float32") and base._can_set_attn_implementation():
        attend = partial(_attend, ALL_ATTENTION_FUNCTIONS[now], kind == _FLASH)
        AttentionInterface.register(now + kind + _SUFFIX, attend)
        AttentionMaskInterface.register(now + kind + _SUFFIX, sdpa_mask)
        if base.config._attn_implementation != now + kind + _SUFFIX:
            base.set_attn_implementation(now + kind + _SUFFIX)
    return str(base.config._attn_implementation).endswith(_SUFFIX)


def _rows_are_apart(model: PreTrainedModel, *, flash: bool) -> bool:
    if getattr(cast(Any, plain(model)).config, "attn_temperature_tuning", False):
        return False  # it counts the tokens of the sequence, far beyond those tried here
    ids = probe(model)[0].tolist()
    one, two, other = ids[:5], ids[5:], ids[::-1][:5]
    for shared in (0, 3):
        prefix = ids[4 : 4 + shared]
        try:
            first, second = (_pack(model, prefix, [x, two, x], flash) for x in (one, other))
            alone = _run(model, torch.tensor([[*prefix, *two]]), flash)[shared:]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise  # says nothing about the model
            return False
        own = slice(shared + len(one), shared + len(one) + len(two))
        if not (torch.equal(first[own], second[own]) and agree(model, first[own], alone)):
            return False
    return True


def _pack(model: PreTrainedModel, prefix: list[int], rows: list[list[int]], half: bool) -> Tensor:
    """Logits [token, vocab] of a prefix and rows behind it."""
    ids, positions, table = lay_out([[*prefix, *row] for row in rows], len(prefix))
    device = cast(Any, model).device
    mask = as_mask(table.to(device), len(prefix))
    return _run(model, ids, half, attention_mask=mask, position_ids=positions.to(device))


def _run(model: PreTrainedModel, ids: Tensor, half: bool, **rest: Any) -> Tensor:
    """Logits [token, vocab]; with `half`, by products in 16 bits if the weights are in float32."""
    kind, device = cast(Any, plain(model)).dtype, cast(Any, model).device
    kind = torch.bfloat16 if half and kind == torch.float32 else kind
    # Without autocast, adapters in float32 refuse the states of a base in 16 bits.
    with torch.autocast(device.type, kind, enabled=kind in (torch.bfloat16, torch.float16)):
        out = cast(Any, model)(input_ids=ids.to(device), use_cache=False, **rest)
    return cast(Tensor, out.logits)[0]


def _longest(model: PreTrainedModel) -> int:
    """Rows up to this length are within every window of the attention, and do not depend on how
    long the whole sequence is."""
    windows = windows_of(cast(Any, plain(model)).config)
    return min([*windows, ways(model).limit or sys.maxsize])
