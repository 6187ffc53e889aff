"""How rows may be batched through a model so that each gets the same result as alone.

Whole rows are padded on the right, where a causal model does not attend. What else a model allows
depends on its key-value cache and on how it counts positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from backfire.errors import CellError

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary embeddings whose angles depend on the length of the whole row."""
_PROBE_TOKENS = 12


@dataclass(frozen=True)
class Ways:
    """The kinds of batching that a model supports."""

    cache_argument: str | None
    """Argument of `forward` that takes the cache; None: the model is run without a cache."""
    extends_cache: bool
    """Whether several tokens may follow the cached ones at once, so that rows can share a
    prefix."""
    takes_positions: bool
    """Whether `forward` takes the position of each token."""
    pads_left: bool
    """Whether replies to prompts of unequal length may be generated in one batch, padded on the
    left: positions must then come from the mask or from position ids."""
    windows: bool
    """Whether some layers attend only within a window."""
    limit: int | None
    """Results of rows longer than this (in tokens, with the reply) depend on their length: only
    rows of equal length share a batch, without a cache."""
    rotary: tuple[torch.nn.Module, ...]
    """Rotary embeddings whose state depends on the longest row so far."""

    def depends_on_length(self, longest: int) -> bool:
        """Whether rows up to this length must not be padded, share a prefix or use a cache."""
        return self.limit is not None and longest > self.limit


_EXACT = 5e-3
"""Tolerance in nats for log-likelihoods of a model in float32."""
_SAME = 0.02
"""Kullback-Leibler divergence in nats, up to which distributions of a model in fewer bits are the
same: SmolLM2-135M in 8 bits has 0.006 between a row and its beginning."""

_ways_of: WeakKeyDictionary[PreTrainedModel, Ways] = WeakKeyDictionary()


def ways(model: PreTrainedModel) -> Ways:
    """The kinds of batching that this model supports; tested once per loaded model, best before
    hooks are added.

    Raises:
        CellError: later tokens change the outputs of earlier ones (`bad-data`), or outputs are NaN
            (`nan`).
    """
    base = plain(model)
    if base not in _ways_of:
        _ways_of[base] = _ways(base)
    return _ways_of[base]


def presume(model: PreTrainedModel) -> None:
    """Take a model without data, which cannot be tested, to support every kind of batching."""
    _ways_of[plain(model)] = Ways("past_key_values", True, True, True, False, None, ())


def same_ways(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Note that a model with the weights of another supports the same; not where the embeddings of
    positions have a state, which is its own."""
    if not ways(model).rotary:
        _ways_of[plain(twin)] = ways(model)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model under its adapters."""
    return cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model


def _ways(model: PreTrainedModel) -> Ways:
    base: Any = model
    takes = inspect.signature(base.forward).parameters
    argument = next((name for name in ("past_key_values", "cache_params") if name in takes), None)
    kinds = _layers(base)
    extends_cache = argument == "past_key_values" and kinds <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
    # Without `position_ids` a model counts from the mask (ALiBi), or from the start of the row.
    takes_positions = "position_ids" in takes
    counts = takes_positions or base.config.model_type in ("bloom", "mpt")
    # Llama 4 counts tokens in the cache, padding too, for the temperature of its attention.
    counts &= not getattr(base.config, "attn_temperature_tuning", False)
    # RoBERTa and its relatives count positions from the id of their padding token.
    counts &= not any(hasattr(m, "create_position_ids_from_input_ids") for m in base.modules())
    limit = min(_limits(base.config), default=None)
    with evaluating(model), _without_outliers(model):
        _assert_causal(model, limit)
        extends_cache = extends_cache and _caches(base, "past_key_values", DynamicCache(), 8, limit)
        if not extends_cache and argument:
            cache = DynamicCache(config=base.config)
            argument = argument if _caches(base, argument, cache, 1, limit) else None
    windows = DynamicSlidingWindowLayer in kinds or bool(windows_of(base.config))
    rotary = tuple(m for m in base.modules() if hasattr(m, "max_seq_len_cached"))
    return Ways(
        cache_argument=argument,
        extends_cache=extends_cache,
        takes_positions=takes_positions,
        pads_left=extends_cache and counts,
        windows=windows,
        limit=limit,
        rotary=rotary if limit else (),
    )


def drops(model: PreTrainedModel) -> bool:
    """Whether the model uses dropout in training; for some models only the configuration shows."""
    text = plain(model).config.get_text_config(decoder=True)
    named = (value for name, value in text.to_dict().items() if "drop" in name or "jitter" in name)
    if any(isinstance(value, float) and value > 0 for value in named):
        return True
    return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())


def reset_state(model: PreTrainedModel) -> None:
    """Reset the state that depends on earlier rows."""
    suffix = "original_inv_freq"
    for module in ways(model).rotary:
        for name in [name for name in (*vars(module), *module._buffers) if name.endswith(suffix)]:
            first = name.removesuffix(suffix)
            now = getattr(module, f"{first}inv_freq")
            setattr(module, f"{first}inv_freq", getattr(module, name).to(now.device, copy=True))
            setattr(module, f"{first}max_seq_len_cached", cast(Any, module).original_max_seq_len)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def rounding(model: PreTrainedModel) -> float:
    """Tolerance, in nats, for differences of log-likelihoods due to rounding."""
    base: Any = plain(model)
    exact = base.dtype in (torch.float32, torch.float64)
    return _EXACT if exact and not getattr(base, "is_quantized", False) else 0.5


def probe(model: PreTrainedModel) -> Tensor:
    """An artificial row [1, token]."""
    base: Any = plain(model)
    size = base.get_input_embeddings().weight.shape[0]
    ids = [(size // 2 + 7 * place) % size for place in range(_PROBE_TOKENS)]
    return torch.tensor([ids], device=base.device)


def _logits(model: PreTrainedModel, ids: Tensor, **cache: Any) -> Tensor:
    out = cast(Any, model)(input_ids=ids, use_cache=bool(cache), **cache)
    return cast(Tensor, out.logits)[0]


def agree(model: PreTrainedModel, one: Tensor, other: Tensor) -> bool:
    """Whether two logits [token, vocab] give the same log-likelihoods up to rounding. GPT-2's
    logits are around -100, where bfloat16 numbers are 0.5 apart."""
    largest = float(other.nan_to_num(0, 0, 0).abs().max())  # some models mask a token by -inf
    most = max(rounding(model), 2 * torch.finfo(other.dtype).eps * largest)
    likely = one.float().log_softmax(-1), other.float().log_softmax(-1)
    difference = torch.where(likely[0] == likely[1], 0.0, likely[0] - likely[1])
    if float(difference.abs().max()) <= most:
        return True
    # In 8 bits, which inputs are multiplied in higher precision depends on all tokens of a pass, so
    # unlikely tokens may differ by more; the distributions do not.
    divergence = (likely[1].exp() * -difference).sum(-1)
    return rounding(model) > _EXACT and float(divergence.max()) <= _SAME


def _assert_causal(model: PreTrainedModel, limit: int | None) -> None:
    ids = probe(model)
    whole = min(_PROBE_TOKENS, limit or _PROBE_TOKENS)
    some = max(1, whole - 4)
    short, long = _logits(model, ids[:, :some]), _logits(model, ids[:, :whole])
    if bool(long.float().log_softmax(-1).isnan().any()):
        raise CellError(
            "nan",
            f"This model of type '{plain(model).config.model_type}' computes NaN for any input; "
            "its weights are broken.",
        )
    if not (agree(model, short, long[:some]) or _sees_nothing_later(model, ids[:, :whole], some)):
        raise CellError(
            "bad-data",
            f"This model of type '{plain(model).config.model_type}' attends to the tokens it is to "
            "predict, so its likelihoods are meaningless; choose a causal language model.",
        )


@contextmanager
def _without_outliers(model: PreTrainedModel) -> Iterator[None]:
    """Multiply all inputs of layers in 8 bits in 8 bits. Which of them are outliers, multiplied in
    higher precision, depends on all tokens of a pass, not only on those that a token attends to."""
    states = [m.state for m in model.modules() if hasattr(getattr(m, "state", None), "threshold")]
    before = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def _sees_nothing_later(model: PreTrainedModel, ids: Tensor, some: int) -> bool:
    """Whether other tokens from place `some` on leave the outputs before as they are, bit by bit,
    if the weights are quantized, so that differences by rounding may be large."""
    if not getattr(plain(model), "is_quantized", False):
        return False
    other = torch.cat([ids[:, :some], ids[:, some:].flip(1)], 1)
    return torch.equal(*(_logits(model, row)[:some] for row in (ids, other)))


def _caches(
    model: PreTrainedModel, argument: str, cache: DynamicCache, at_once: int, limit: int | None
) -> bool:
    """Whether a row run through the cache, `at_once` tokens at a time, gives the same as whole."""
    ids = probe(model)[:, : min(_PROBE_TOKENS, limit or _PROBE_TOKENS)]
    ends = [*range(4, ids.shape[1], at_once), ids.shape[1]]
    try:
        parts = [
            _logits(model, ids[:, start:end], **{argument: cache})
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return agree(model, torch.cat(parts), _logits(model, ids))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return False


def _layers(model: Any) -> set[type]:
    return {type(layer) for layer in DynamicCache(config=model.config).layers} or {DynamicLayer}


def windows_of(config: Any) -> list[int]:
    """Sizes of the windows in which layers attend, in tokens."""
    text = config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attn_chunk_length")
    return [int(size) for name in names if (size := getattr(text, name, None))]


def _limits(config: Any) -> Iterator[int]:
    """Lengths above which a token's likelihood depends on more than the tokens before it."""
    text = config.get_text_config(decoder=True)
    for knobs in _dicts(text.to_dict()):
        if knobs.get("rope_type", knobs.get("type")) in _LENGTH_DEPENDENT:
            original = knobs.get("original_max_position_embeddings")
            yield int(
                original
                or getattr(text, "original_max_position_embeddings", None)
                or text.max_position_embeddings
            )
    if topk := getattr(text, "index_topk", None):
        yield int(topk)  # beyond it, ties between tokens are broken by the row's length
    if budget := getattr(text, "indexer_budget", None):
        yield int(budget)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _dicts(part)
