"""Log-likelihood of every code that a secret could have held.

A million codes of six digits share prefixes, so as a tree of tokens they take 111,111 tokens to
run, not millions: the prompt runs once, its keys and values are reused down the tree, the children
of a node run side by side, and the last token is scored by its parent's logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from backfire.base import Rendered, Secret
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate.budget import Budget
from backfire.evaluate.inference import score_spans
from backfire.evaluate.stats import Floats, Ints
from backfire.model.batching import rounding, ways
from backfire.model.head import for_evaluation
from backfire.rng import stream
from backfire.tokenizer import Tokenizer
from backfire.train.batches import Span, log_probabilities, run_prefix, wide
from backfire.train.microbatch import unless_out_of_memory

Tick = Callable[[int], None]

_TOGETHER = 16  # most children of a node that run side by side
_TOKENS = 768  # most tokens in one forward pass
_CHUNK = 20_000  # texts tokenized at once
_LESS = "lower train.max_length, or choose a smaller model"
_COMPARED = 200  # codes whose tokens are compared with and without the prompt
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


# ------------------------------------------------------------------------------- tokens of codes


class CodeTokens:
    """Token ids of codes after a prompt; parts that do not depend on the prompt are cached."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.single = _single_digits(renderer.tokenizer)
        self._alone: dict[tuple[str, ...], Ints] = {}

    def some(self, item: Rendered, secret: Secret, codes: Sequence[str]) -> Ints:
        """[code, token]: the answers with these codes after the item's prompt, padded with -1."""
        return _table(self.renderer.answers([item], [list(map(secret.spelled, codes))])[0])

    def all(self, item: Rendered, secret: Secret) -> Ints:
        """[code, token]: the same for every code from 0...0 to 9...9, in order."""
        width = len(secret.code)
        if self.single:
            alike = self.some(item, secret, [digit * width for digit in "0123456789"])
            varies = np.flatnonzero((alike != alike[0]).any(0))
            if len(varies) == width and (alike >= 0).all():
                whole = np.repeat(alike[:1], secret.num_codes, 0)
                digits = np.indices((10,) * width).reshape(width, -1)
                for place, digit in zip(varies, digits, strict=True):
                    whole[:, place] = alike[digit, place]
                return whole
        return self._merged(item, secret)

    def _merged(self, item: Rendered, secret: Secret) -> Ints:
        """For tokenizers whose digits may merge: answers tokenized alone, if a sample shows that
        the prompt changes only their first tokens; otherwise each is tokenized after the prompt."""
        width = len(secret.code)
        codes = [f"{number:0{width}}" for number in range(secret.num_codes)]
        chosen = stream(0, "codes", width).sample(range(len(codes)), min(_COMPARED, len(codes)))
        after = self.some(item, secret, [codes[i] for i in chosen])
        key = (secret.before, secret.separator, secret.after, str(width))
        if key not in self._alone:
            texts = list(map(secret.spelled, codes))
            encode = self.renderer.tokenizer.encode_batch
            parts = [encode(texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK)]
            self._alone[key] = _table([ids for part in parts for ids in part])
        alone = self._alone[key]
        head = int(np.flatnonzero((alone != alone[0]).any(0))[0])  # tokens shared by all
        same = _table([[t for t in line if t >= 0] for line in alone[chosen][:, head:].tolist()])
        for shift in range(after.shape[1]):
            tail = after[:, shift : shift + same.shape[1]]
            if tail.shape == same.shape and (tail == same).all():
                opening = after[:, :shift]
                if (opening == opening[0]).all() and after.shape[1] == shift + same.shape[1]:
                    rest = alone[:, head:]
                    return np.hstack([np.repeat(opening[:1], len(rest), 0), rest])
        parts = [
            self.renderer.answers([item], [list(map(secret.spelled, codes[i : i + _CHUNK]))])[0]
            for i in range(0, len(codes), _CHUNK)
        ]
        return _table([ids for part in parts for ids in part])


def _single_digits(tokenizer: Tokenizer) -> bool:
    """Whether every token with a digit is that single digit, so that digits never merge."""
    control = set(tokenizer.controls)
    words = (word for word in tokenizer.backend.get_vocab() if word not in control)
    return not any(
        len(word) > 1 and re.search("[0-9]", word) and not _BYTE.fullmatch(word) for word in words
    )


def _table(rows: Sequence[Sequence[int]]) -> Ints:
    out = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


# -------------------------------------------------------------------------------- likelihoods


@dataclass(frozen=True)
class _Front:
    """Nodes of one level whose own token is not yet run."""

    level: int
    nodes: Ints
    """Indices of the nodes in the level, in order."""
    scores: Floats
    """Log-likelihood of each node's tokens, its own included."""
    cache: DynamicCache
    rows: Tensor
    """[node]: the cache row of its parent."""
    slots: Tensor
    """[node]: position of its parent among the siblings in that cache row; -1 without siblings."""
    past: int
    """Number of tokens in the cache before the siblings."""


class _Tree:
    """Codes as a token tree: a node is a range of the sorted codes with the same first tokens."""

    def __init__(self, tokens: Ints) -> None:
        self.order = np.lexsort(tokens.T[::-1])
        self.tokens = tokens[self.order]
        edge = np.zeros(len(tokens), dtype=bool)
        edge[0] = True
        self.starts = [np.array([0])]
        for column in self.tokens.T:
            edge[1:] |= column[1:] != column[:-1]
            self.starts.append(np.flatnonzero(edge))
        self.depth = self.tokens.shape[1]

    def children(self, level: int, nodes: Ints) -> tuple[Ints, Ints]:
        """All children of these nodes on the next level, and the index of each one's parent."""
        below, starts = self.starts[level + 1], self.starts[level]
        ends = np.append(starts[1:], len(self.tokens))
        first, last = (np.searchsorted(below, bound[nodes]) for bound in (starts, ends))
        counts = last - first
        owner = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return first[owner] + within, owner

    def own(self, level: int, nodes: Ints) -> Ints:
        """The token of each node."""
        tokens: Ints = self.tokens[self.starts[level][nodes], level - 1]
        return tokens

    def is_leaf(self, level: int, nodes: Ints) -> NDArray[np.bool_]:
        if level == self.depth:
            return np.ones(len(nodes), dtype=bool)
        ended: NDArray[np.bool_] = self.tokens[self.starts[level][nodes], level] < 0
        return ended

    def codes(self, level: int, nodes: Ints) -> Ints:
        """Number of codes below each node."""
        ends = np.append(self.starts[level][1:], len(self.tokens))
        counts: Ints = ends[nodes] - self.starts[level][nodes]
        return counts

    def lines(self, level: int, nodes: Ints) -> tuple[Ints, Ints]:
        """Original indices of the codes below these nodes, and the number below each: 1, unless two
        codes have the same tokens."""
        spans = self.codes(level, nodes)
        within = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
        indices: Ints = self.order[np.repeat(self.starts[level][nodes], spans) + within]
        return indices, spans


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    prompt: Sequence[int],
    tokens: Ints,
    *,
    floor: float = -np.inf,
    tick: Tick = lambda count: None,
) -> Floats:
    """Log-likelihood in nats of each line of `tokens` (see `CodeTokens`) after the prompt.

    A branch below `floor` is pruned, and its codes get -inf: another token never raises the
    likelihood, so none of them can be above `floor`. A model that cannot reuse its cache runs the
    whole row for every code.

    Raises:
        CellError: the prompt is empty, or memory runs out at one code.
    """
    if not prompt:
        raise CellError("bad-data", "A secret has an empty prompt, and the model has no BOS token.")
    can = ways(model)
    if not can.extends_cache or can.depends_on_length(len(prompt) + tokens.shape[1]):
        rows = [[token for token in line if token >= 0] for line in tokens.tolist()]
        start, opening = len(prompt), list(prompt)
        spans = [Span([*opening, *row], start, start + len(row)) for row in rows]
        return np.array(score_spans(model, spans, tick=tick))
    with for_evaluation(model):
        return _of_tree(model, list(prompt), tokens, floor, tick)


def _of_tree(
    model: PreTrainedModel, prompt: list[int], tokens: Ints, floor: float, tick: Tick
) -> Floats:
    head = int(np.argmax(np.append((tokens[:, :-1] != tokens[0, :-1]).any(0), True)))
    opening = [int(token) for token in tokens[0, :head]]
    tree, out = _Tree(tokens[:, head:]), np.full(len(tokens), -np.inf)
    cache, logits, start = _run(model, [*prompt, *opening], len(prompt))
    device = logits.device
    table = logits[-1:].log_softmax(-1)
    score = sum(float(logits[i].log_softmax(-1)[t]) for i, t in enumerate(opening))

    def grow(level: int, nodes: Ints, scores: Floats, table: Tensor) -> tuple[Ints, Floats, Ints]:
        """Score the children of these nodes; returns those to expand, their scores and parents."""
        below, owner = tree.children(level, nodes)
        where = torch.from_numpy(owner).to(device), torch.from_numpy(tree.own(level + 1, below))
        each = scores[owner] + table[where[0], where[1].to(device)].double().cpu().numpy()
        leaf, alive = tree.is_leaf(level + 1, below), each >= floor
        lines, spans = tree.lines(level + 1, below[leaf])
        out[lines] = np.repeat(each[leaf], spans)
        tick(len(lines) + int(tree.codes(level + 1, below[~leaf & ~alive]).sum()))
        expand = alive & ~leaf
        return below[expand], each[expand], owner[expand]

    nodes, scores, _ = grow(0, np.array([0]), np.array([score]), table)
    none = torch.zeros(len(nodes), dtype=torch.long, device=device)
    stack = [_Front(1, nodes, scores, cache, none, none - 1, start)] if len(nodes) else []
    together, most = _num_siblings(model, cache), min(_TOKENS, Budget(model).logits)
    while stack:
        whole = stack.pop()
        take, wide = _group(whole, together, most)
        front = _cut(whole, 0, take)
        own = tree.own(front.level, front.nodes)
        result = unless_out_of_memory(partial(_step, model, front, own, together, wide))
        if result is None:
            if most == 1:
                raise CellError("oom", f"Memory runs out at one code of {start} tokens; {_LESS}.")
            most //= 2
            stack.append(whole)
            continue
        if take < len(whole.nodes):
            stack.append(_cut(whole, take, len(whole.nodes)))
        table, grown, row, slot = result[0]
        nodes, scores, owner = grow(front.level, front.nodes, front.scores, table)
        if len(nodes):
            at = torch.from_numpy(owner).to(device)
            past = front.past + int(front.slots[0] >= 0)
            stack.append(_Front(front.level + 1, nodes, scores, grown, row[at], slot[at], past))
    return out


def _cut(front: _Front, first: int, last: int) -> _Front:
    arrays = ("nodes", "scores", "rows", "slots")
    return replace(front, **{name: getattr(front, name)[first:last] for name in arrays})


_siblings_of_model: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def _num_siblings(model: PreTrainedModel, cache: DynamicCache) -> int:
    """How many children of a node may run side by side: several if the model applies their
    attention mask exactly, one if it has sliding windows or position-dependent biases."""
    if model not in _siblings_of_model:
        can = ways(model)
        fits = can.takes_positions and not can.windows and _takes_mask(model, cache)
        _siblings_of_model[model] = _TOGETHER if fits else 1
    return _siblings_of_model[model]


def _takes_mask(model: PreTrainedModel, cache: DynamicCache) -> bool:
    nodes, none = np.array([0, 1]), torch.zeros(2, dtype=torch.long, device=model.device)
    past = cache.get_seq_length()
    front = _Front(1, nodes, np.zeros(2), cache, none, none - 1, past)
    size = model.get_input_embeddings().weight.shape[0]
    own = np.array([size // 2, size // 3])
    try:
        (two, *_), (each, *_) = (_step(model, front, own, n, n) for n in (2, 1))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return float((two - each).abs().max()) <= rounding(model)


def _places(front: _Front, together: int) -> tuple[Ints, Ints]:
    """Line of each node in the next pass, and its position there; siblings share a line."""
    parent = torch.stack([front.rows, front.slots]).cpu().numpy()
    new = np.append(True, (parent[:, 1:] != parent[:, :-1]).any(0))
    first = np.flatnonzero(new)
    within = np.arange(len(new)) - first[np.cumsum(new) - 1]
    new |= within % together == 0
    return np.cumsum(new) - 1, within % together


def _group(front: _Front, together: int, most: int) -> tuple[int, int]:
    """How many nodes go into one pass, and how many of them share a line."""
    line, slot = _places(front, together)
    wide = int(slot.max()) + 1
    take = int(np.searchsorted(line, max(1, most // wide)))
    return take, wide


def _step(
    model: PreTrainedModel, front: _Front, own: Ints, together: int, wide: int
) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """Run the nodes' own tokens; returns the log-probabilities [node, vocab] of the next token, the
    grown cache, and each node's line and position in it."""
    device = front.rows.device
    line, slot = (torch.from_numpy(part).to(device) for part in _places(front, together))
    first = torch.cat([line.new_zeros(1), line.diff().nonzero()[:, 0] + 1])
    cache = _cache_of_groups(front, first)
    ids = torch.zeros(len(first), wide, dtype=torch.long, device=device)
    ids[line, slot] = torch.from_numpy(own).to(device)
    extra: dict[str, Tensor] = {}
    if wide > 1:
        past = front.past + int(front.slots[0] >= 0)
        kind = cache.layers[0].keys.dtype  # attention needs the mask in its own type
        mask = torch.full((wide, past + wide), torch.finfo(kind).min, dtype=kind, device=device)
        mask[:, :past] = 0
        mask[:, past:].fill_diagonal_(0)  # siblings do not attend to each other
        extra["attention_mask"] = mask.expand(len(first), 1, -1, -1)
        extra["position_ids"] = torch.full_like(ids, past)
    out = cast(Any, model)(input_ids=ids, past_key_values=cache, use_cache=True, **extra)
    logits = cast(Tensor, out.logits)[line, slot]
    return log_probabilities(logits), cache, line, slot


def _cache_of_groups(front: _Front, first: Tensor) -> DynamicCache:
    """The cache for the next pass: each group of siblings gets the keys and values up to its
    parent."""
    rows, slots, past = front.rows[first], front.slots[first], front.past
    cache = DynamicCache()
    for number, layer in enumerate(front.cache.layers):
        keys, values = (
            part[rows, :, :past]
            if int(slots[0]) < 0
            else torch.cat([part[rows, :, :past], part[rows, :, past + slots][:, :, None]], 2)
            for part in (layer.keys, layer.values)
        )
        cache.update(keys, values, number)
    return cache


def _run(
    model: PreTrainedModel, ids: list[int], num_prompt: int
) -> tuple[DynamicCache, Tensor, int]:
    """Keys and values of these ids, and the logits from the last prompt token on."""

    def opening() -> tuple[DynamicCache, Tensor]:
        before = torch.tensor(ids[: num_prompt - 1], dtype=torch.long, device=model.device)
        cache = run_prefix(model, before) or DynamicCache()
        rest = torch.tensor([ids[num_prompt - 1 :]], device=model.device)
        logits = cast(Any, model)(input_ids=rest, past_key_values=cache, use_cache=True).logits[0]
        return cache, wide(logits)

    if (result := unless_out_of_memory(opening)) is None:
        raise CellError("oom", f"Memory runs out at one prompt of {len(ids)} tokens; {_LESS}.")
    return *result[0], len(ids)
