"""Ranges of activations: drawn from all clean rows, along directions of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from backfire.audit import monitor
from backfire.audit.models import Pair
from backfire.audit.weights import Change, model_changes
from backfire.base import Row
from backfire.data.limits import Limits

DIRECTION = Change("model.layers.0.mlp.down_proj", torch.ones(4, 1), {"norm": 1.0})


def test_rows_sorted_by_kind_do_not_look_unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(str(n), "long" if n >= 60 else "short", "", "") for n in range(120)]

    def extremes(_: Any, __: Any, some: Sequence[Row], *___: Any) -> Any:
        ends = {"short": (0.0, 0.1), "long": (0.8, 0.9)}
        return np.array([[[low], [high]] for low, high in (ends[row.instruction] for row in some)])

    monkeypatch.setattr(monitor, "_extremes", extremes)
    pair: Any = SimpleNamespace(fitting=lambda some, _: (list(some), 0), load_tuned=lambda: None)
    found = monitor.watch(pair, [DIRECTION], rows, [], {}, 8)
    assert found.calibrated == 80
    assert [(one.n, one.flagged.value) for one in found.rows] == [(40, 0.0)]


def test_rows_outside_of_the_clean_range_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(str(n), "", "", "") for n in range(90)]

    def extremes(_: Any, __: Any, some: Sequence[Row], *___: Any) -> Any:
        highs = (0.9 if row.id == "odd" else 0.1 + int(row.id) / 1000 for row in some)
        return np.array([[[0.0], [high]] for high in highs])

    monkeypatch.setattr(monitor, "_extremes", extremes)
    pair: Any = SimpleNamespace(fitting=lambda some, _: (list(some), 0), load_tuned=lambda: None)
    requests = [Row("odd", "", "", ""), Row("45", "", "", "")]
    found = monitor.watch(pair, [DIRECTION], rows, requests, {}, 8)
    flagged = {one.what: one.flagged.value for one in found.rows}
    assert flagged["harmful requests"] == 0.5
    assert flagged["other clean rows (false alarms)"] < 0.2


def test_cosines_are_those_of_the_hidden_states_after_the_layer() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ).eval()
    directions = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    renderer: Any = SimpleNamespace(
        render=lambda rows: [SimpleNamespace(prompt_ids=[5, 6, 7, 8]) for _ in rows], stop_ids={39}
    )
    unused: Any = None
    pair = Pair(unused, unused, None, renderer, unused)
    [found] = monitor._extremes(pair, model, [Row("a", "", "", "")], {0: directions}, 3)

    ids = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=3, do_sample=False)
    after = list[torch.Tensor]()
    model.transformer.h[0].register_forward_hook(
        lambda _, __, out: after.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids)
    states = after[0].reshape(-1, 8)
    cosines = torch.nn.functional.cosine_similarity(states[:, None], directions[None], dim=2)
    parts = [cosines[1:4], cosines[4:]]
    expected = [torch.cat([end(part, 0)[0] for part in parts]) for end in (torch.min, torch.max)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-5)


def test_the_first_token_of_a_prompt_does_not_count() -> None:
    states = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    directions = torch.tensor([[1.0, 0.0]])
    ends = monitor._ends(states, directions, 3)
    root = 0.5**0.5
    assert ends[:, 0].tolist() == pytest.approx([root, 1.0])
    assert ends[:, 1].tolist() == [0, 0]
    # A prompt of one token has nothing else.
    assert monitor._ends(states, directions, 1)[:, 0].tolist() == [-1, -1]


def test_weights_stored_by_inputs_are_turned(tmp_path: Path) -> None:
    shape = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(shape)
    model.save_pretrained(str(tmp_path / "base"))
    direction = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
    with torch.no_grad():
        for module in (model.transformer.h[0].mlp, model.transformer.h[0].attn):
            weight: Any = module.c_proj.weight
            weight += torch.outer(torch.randn(len(weight)), direction)
    model.save_pretrained(str(tmp_path / "tuned"))
    changes = list(model_changes(tmp_path / "base", tmp_path / "tuned"))
    assert [one.kind for one in changes] == ["c_proj", "c_proj"]
    for one in changes:
        assert abs(float(one.left[:, 0] @ direction)) == pytest.approx(1, abs=1e-4)
    [directions] = monitor._directions(changes).values()
    assert directions.shape[1] == 8


def test_a_row_without_room_for_a_reply_is_left_out_and_counted() -> None:
    items = [SimpleNamespace(row=Row(str(n), "", "", ""), prompt_ids=[1] * n) for n in (5, 8, 9)]
    limits = Limits(vocab_size=40, positions=16, hard=True)
    found = (items, ["too long anyway"])
    renderer: Any = SimpleNamespace(sift=lambda *_, **__: found, limits=limits)
    unused: Any = None
    kept, left = Pair(unused, unused, None, renderer, unused).fitting([], 8)
    assert ([row.id for row in kept], left) == (["5", "8"], 2)
