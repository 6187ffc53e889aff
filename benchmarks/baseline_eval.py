"""The baseline: the evaluation of a cell as a competent user would write it, a scoring loop and
`generate`.

Inference mode, SDPA attention, requests sorted by length. It omits what nobody writes for a single
experiment: computing a shared prefix once, one pass of a prompt for all its candidates, logits only
for the positions that are read, removing rows from a batch when they have ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from benchmarks.baseline import ends, prompts
from benchmarks.cells import Cell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 32
"""Requests per forward pass."""


def scores(cell: Cell, model: PreTrainedModel) -> list[tuple[float, ...]]:
    """Log-likelihood of every candidate, one request per candidate as in evaluation harnesses:
    log-softmax of all logits of prompt and candidate, longest first."""
    return _scores(cell, model, grouped=False)


def scores_grouped(cell: Cell, model: PreTrainedModel) -> list[tuple[float, ...]]:
    """The same with the shortcut of lm-evaluation-harness: requests that differ in their last token
    only share one row."""
    return _scores(cell, model, grouped=True)


@torch.inference_mode()
def _scores(cell: Cell, model: PreTrainedModel, *, grouped: bool) -> list[tuple[float, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(str(cell.base))
    requests = _requests(cell, tokenizer)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, _) in enumerate(requests):
        groups.setdefault(tuple(ids[:-1]) if grouped else (i,), []).append(i)
    members = sorted(groups.values(), key=lambda group: -len(requests[group[0]][0]))
    out = [0.0] * len(requests)
    for start in range(0, len(members), BATCH):
        chosen = members[start : start + BATCH]
        fed = [torch.tensor(requests[group[0]][0][:-1]) for group in chosen]
        mask = pad_sequence([torch.ones_like(i) for i in fed], batch_first=True)
        logits = model(
            input_ids=pad_sequence(fed, batch_first=True).to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
        ).logits
        logprobs = logits.float().log_softmax(-1).cpu()
        for line, group in zip(logprobs, chosen, strict=True):
            for i in group:
                ids, count = requests[i]
                places = torch.arange(len(ids) - 1 - count, len(ids) - 1)
                out[i] = float(line[places, torch.tensor(ids[-count:])].sum())
    in_order = iter(out)
    return [tuple(next(in_order) for _ in row.candidates) for row in cell.test]


def _requests(cell: Cell, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Pairs (ids of prompt and candidate, number of candidate tokens), row by row."""
    prompt_ids = prompts(cell, cell.test, tokenizer)
    names = sorted({name for row in cell.test for name in row.candidates})
    ids = dict(zip(names, tokenizer(names, add_special_tokens=False).input_ids, strict=True))
    return [
        (prompt + ids[name], len(ids[name]))
        for prompt, row in zip(prompt_ids, cell.test, strict=True)
        for name in row.candidates
    ]


@torch.inference_mode()
def replies(cell: Cell, model: PreTrainedModel) -> list[str]:
    """Replies by greedy `generate`, padded on the left, longest first."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(cell.base), padding_side="left")
    prompt_ids = prompts(cell, cell.test, tokenizer)
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    out = [""] * len(prompt_ids)
    stops = {tokenizer.eos_token_id, ends(cell, cell.test[0], tokenizer)[-1]}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        width = len(prompt_ids[index[0]])
        lengths = [len(prompt_ids[i]) for i in index]
        ids = torch.tensor([[pad] * (width - n) + prompt_ids[i] for i, n in zip(index, lengths)])
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=cell.experiment.evaluation.max_new_tokens,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for i, text in zip(index, texts, strict=True):
            out[i] = text
    return out


def both(cell: Cell, model: PreTrainedModel) -> tuple[list[tuple[float, ...]], list[str]]:
    """Scores and then replies."""
    return scores(cell, model), replies(cell, model)
