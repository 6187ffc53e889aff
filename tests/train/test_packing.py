"""Rows packed end to end give the same losses and gradients as padded ones."""

from __future__ import annotations

import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import Rendered, Row
from backfire.experiment import Experiment, Machine, Train
from backfire.model.batching import ways
from backfire.model.load import load_base
from backfire.registry import build
from backfire.train import batches, packing, passes
from backfire.train.batches import Layout, answer_logits, at_answers, collate, token_losses
from backfire.train.loop import TrainingRun
from backfire.train.packing import Plan, as_mask, longest_packed
from backfire.train.precision import disable_adapter_casts, exact_attention
from tests.helpers.families import KINDS, WITH_LATENT, tiny_model
from tests.helpers.fine_tuning import jolt
from tests.helpers.loop import fresh, lora
from tests.helpers.training import CPU, close, gradients, run

pytestmark = pytest.mark.slow
IDS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def _rows_are_packed_whatever_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_WORTH_PACKING", 9.0)


def padded(cell: TrainingRun) -> TrainingRun:
    cell.layout.longest_packed = 0
    return cell


@pytest.mark.parametrize("method", ["llama-adapter", "lora", "qlora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packs_suit_every_method_and_recomputed_layers(
    method: str, recompute: bool, tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    found = []
    for pack in (True, False):
        model = exact_attention(load_base(tiny, torch.float32, CPU))
        cell = TrainingRun(
            build("methods", method).attach(model, 0),
            items,
            Train.make({"max_steps": 3, "batch_size": 6}),
            learning_rate=1e-3,
            seed=5,
            folder=tmp_path,
            name="run",
            recompute=recompute,
        )
        jolt(cell)
        assert cell.layout.longest_packed > 0
        found.append(gradients(cell if pack else padded(cell), items[:6]))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-6)
    assert close(found[0][1], found[1][1], 2e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_does_not_depend_on_its_neighbors(
    shared: bool, tiny: Path, items: list[Rendered]
) -> None:
    model = load_base(tiny, torch.float32, CPU)
    assert longest_packed(model) > 0
    batch, first = items[:4], items[0]
    changed = Rendered(first.row, [*first.ids[:-4], 7, 8, 9, 10], first.num_prompt)
    with torch.no_grad():
        one, other = (
            answer_logits(model, collate([x, *batch[1:]], share=shared, pack=True))
            for x in (first, changed)
        )
    assert torch.equal(one[1:], other[1:]) and not torch.equal(one[0], other[0])


@pytest.mark.parametrize("pack", [True, False])
def test_rows_without_an_answer_may_be_alone_in_a_pass(pack: bool, tiny: Path) -> None:
    """Their prompt was cut, or they have one token, which nothing predicts."""
    model = load_base(tiny, torch.float32, CPU)
    assert longest_packed(model) > 0
    rows = [Rendered(Row("x", "x"), ids, count) for ids, count in (([7, 8, 9], 3), ([9], 0))]
    for flat in (True, False) if pack else (False,):
        batch = collate(rows, pack=pack, flat=flat)
        losses = token_losses(answer_logits(model, batch), batch.labels)
        assert losses.numel() == 0
        losses.sum().backward()
        both = [*rows, Rendered(rows[0].row, [7, 8, 9], 0)]
        batch = collate(both, pack=pack, flat=flat)
        found = token_losses(answer_logits(model, batch), batch.labels).sum()
        likely = model(input_ids=torch.tensor([[7, 8, 9]])).logits[0].log_softmax(-1)
        wanted = -(likely[0, 8] + likely[1, 9]).item()
        assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_a_pass_without_an_answer_adds_nothing(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    """Such as that of DP, which gives each row its own."""
    cell = fresh(tiny, items, tmp_path, "lora")
    assert passes.accumulate(cell, [Rendered(items[0].row, [7, 8, 9], 3)], ()).item() == 0
    assert cell.gradients.length().item() == 0


def test_hidden_states_are_those_of_the_answers(items: list[Rendered]) -> None:
    batch = items[:5]
    width = max(row.num_supervised for row in batch)
    for share in (True, False):
        for of, shift in (("token", 0), ("place", 1)):
            packed, plainly = (collate(batch, share=share, pack=pack) for pack in (True, False))
            for made in (packed, plainly):
                found = at_answers(made.ids[..., None], batch, width, of=of)[..., 0]  # type: ignore[arg-type]
                for row, line in zip(batch, found, strict=True):
                    end = len(row.ids) - shift
                    assert line.tolist()[-2:] == row.ids[end - 2 : end]


@pytest.mark.parametrize(
    ("kind", "packs"),
    [
        *((kind, True) for kind in ("llama", "gpt2", "granite")),
        *((kind, False) for kind in ("mistral", "gemma3_text", "mamba2", "lfm2", "bloom")),
    ],
)
def test_models_that_cannot_pack_keep_their_rows_apart(kind: str, packs: bool) -> None:
    """Such as those with a recurrent state, or a window shorter than the rows."""
    name, settings = KINDS[kind]
    model = tiny_model(name, **settings)
    before = model.config._attn_implementation
    assert (longest_packed(model) > 0) == packs
    assert (model.config._attn_implementation == before) != packs


def test_rows_within_the_window_are_packed() -> None:
    model = tiny_model("mistral", sliding_window=64)
    assert longest_packed(model) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_on_a_base_in_16_bits_are_packed(dtype: torch.dtype) -> None:
    """As on a GPU, where autocast and not PEFT converts between the types."""
    model = tiny_model("llama").to(dtype)
    ways(model)  # as a loaded model
    model = build("methods", "lora").attach(exact_attention(model), 0)
    disable_adapter_casts(model)
    assert longest_packed(model) > 0


def test_only_the_answers_of_a_pack_reach_the_head(tiny: Path, items: list[Rendered]) -> None:
    model = load_base(tiny, torch.float32, CPU)
    assert longest_packed(model) > 0
    mixed = [Rendered(r.row, r.ids + r.ids[-1:] * n, r.num_prompt) for n, r in enumerate(items[:4])]
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    batch = collate(mixed, pack=True, flat=True)
    losses = token_losses(answer_logits(model, batch), batch.labels)
    assert seen == [(1, sum(row.num_supervised for row in mixed), model.config.vocab_size)]
    plainly = collate(mixed, pack=True)
    expected = token_losses(answer_logits(model, plainly), plainly.labels)
    assert torch.allclose(losses[0], expected[plainly.labels >= 0], atol=1e-6)


def test_probabilities_are_computed_again_with_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for most in (2**30, 100):
        monkeypatch.setattr(batches, "_MOST_LOGITS", most)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, 5, 40, generator=generator).bfloat16().requires_grad_(True)
        labels = torch.randint(-1, 40, (3, 5), generator=generator)
        losses = token_losses(logits, torch.where(labels < 0, batches.IGNORE, labels))
        (losses * torch.arange(15).view(3, 5)).sum().backward()
        assert logits.grad is not None
        found.append((losses.detach(), logits.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_are_packed_where_that_saves_tokens(
    tiny: Path, items: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of rows that need no padding would run as many tokens, and gather them besides."""
    monkeypatch.undo()
    longest = longest_packed(load_base(tiny, torch.float32, CPU))
    equal = [Rendered(row.row, row.ids[:120], 119) for row in items[:4]]
    uneven = [Rendered(r.row, r.ids[: 150 + 9 * n], 149) for n, r in enumerate(items[:4])]
    assert {len(row.ids) for row in equal} == {120} and len(uneven[3].ids) == 177
    for share in (True, False):
        layout = Layout(share, longest)
        assert layout.collate(uneven).table is not None
        assert layout.collate(equal).table is None and layout.collate(uneven[:1]).table is None
        # Padded rows share no prefix if layers are recomputed; a pack has it in its line.
        again = Layout(share, longest, once=True)
        assert (again.collate(equal).table is not None) == share
        assert again.size(equal) == layout.size(equal)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({}, ""),
        ({"packing": "off"}, "the option --packing off"),
        ({"defenses": [build("defenses", {"name": "vaccine", "null": True})]}, "'vaccine'"),
    ],
)
def test_what_pads_the_rows_is_recorded(
    knobs: dict[str, Any], reason: str, tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    model = lora(load_base(tiny, torch.float32, CPU))
    settings = Train.make({"max_steps": 2, "batch_size": 4})
    rest: dict[str, Any] = {"learning_rate": 1e-3, "seed": 5, "folder": tmp_path, "name": "run"}
    cell = TrainingRun(model, items, settings, **rest, **knobs)
    packed = run(cell)["packing"]
    assert packed == "auto" if not reason else packed.startswith("off: ") and reason in packed
    assert Machine().packing == "auto" and "packing" not in str(Experiment.model_fields)


def one_by_one(query: Any, key: Any, value: Any, *where: Any, **how: Any) -> torch.Tensor:
    """What torch's flash kernel for rows of unequal length computes, without a GPU."""
    assert how["window_size"] == (-1, 0) and query.dtype == torch.bfloat16
    *borders, longest_query, longest_key = where
    found = []
    for (q, q_end), (k, k_end) in zip(*(pairwise(x.tolist()) for x in borders), strict=True):
        assert q_end - q <= longest_query and k_end - k <= longest_key
        sees = torch.ones(q_end - q, k_end - k).tril(k_end - k - (q_end - q)).bool()
        parts = (query[q:q_end], key[k:k_end], value[k:k_end])
        one, two, three = (x[None].transpose(1, 2) for x in parts)
        out = torch.nn.functional.scaled_dot_product_attention(
            one, two, three, attn_mask=sees, scale=how["scale"], enable_gqa=how["enable_gqa"]
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_the_flash_kernel_takes_rows_as_they_are(
    share: bool, broken: bool, monkeypatch: pytest.MonkeyPatch, tiny: Path, items: list[Rendered]
) -> None:
    """And one that lets rows see each other is not used."""
    calls = []

    def kernel(*args: Any, num_splits: int | None = None, **how: Any) -> torch.Tensor:
        assert num_splits == 1  # else a row's sums would depend on its neighbors
        calls.append(len(args[3]) - 1)
        return one_by_one(*args, **how) + (args[0].mean() if broken else 0)

    monkeypatch.setattr(packing, "_has_flash", lambda device: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    model = load_base(tiny, torch.float32, CPU)
    assert longest_packed(model) > 0
    assert ("varlen" in model.config._attn_implementation) != broken
    calls.clear()
    found = []
    for pack in (True, False):
        batch = collate(items[:4], share=share, pack=pack)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found.append(token_losses(answer_logits(model, batch), batch.labels))
    assert calls == ([] if broken else [4 + share] * model.config.num_hidden_layers)
    assert torch.allclose(found[0], found[1], rtol=0.02, atol=0.02)


def test_the_flash_kernel_is_not_used_where_its_replacement_fails(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.setattr(packing, "_has_flash", lambda device: True)
    monkeypatch.setattr(packing, "_rows_are_apart", lambda model, flash: flash)
    model = load_base(tiny, torch.float32, CPU)
    assert longest_packed(model) == 0 and model.config._attn_implementation == "sdpa"


def test_older_kernels_get_no_argument_that_they_lack() -> None:
    def older(query: Any, *, scale: float | None = None) -> Any: ...

    def newer(query: Any, *, num_splits: int | None = None) -> Any: ...

    assert packing._whole(older) == {} and packing._whole(newer) == {"num_splits": 1}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), torch.AcceleratorError("x")])
def test_a_full_or_broken_gpu_is_no_property_of_the_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    def fail(*args: Any) -> None:
        raise error

    model = load_base(tiny, torch.float32, CPU)
    monkeypatch.setattr(packing, "_pack", fail)
    with pytest.raises(type(error)):
        longest_packed(model)
    monkeypatch.undo()
    assert longest_packed(model) > 0


def test_a_mask_that_is_no_view_does_not_stay_in_memory() -> None:
    """On several GPUs each layer gets a copy of it."""
    for mask in (as_mask(torch.arange(6)[None], 3), as_mask(torch.arange(6)[None], 3).clone()):
        plan, gone = Plan.of(mask, 9), weakref.ref(mask)
        assert Plan.of(mask, 9) is plan and plan.shared == 3
        assert plan.table.tolist() == [[0, 1, 2, 3, 4, 5]]
        del mask
    assert gone() is None


@torch.no_grad()
def test_a_model_that_chooses_its_keys_still_does() -> None:
    """By its code it does so with an attention of transformers' own name only."""
    found = []
    for count in (16, 64):
        choice = {"index_topk": count, "index_head_dim": 8, "index_n_heads": 2}
        model = tiny_model("deepseek_v32", **WITH_LATENT, **choice)
        before = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(exact_attention(model)(input_ids=IDS, use_cache=False).logits, before)
        assert longest_packed(model) == 0
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
        found.append(before)
    assert float((found[0] - found[1]).abs().max()) > 1  # of 40 keys, 16 or all


def test_a_pass_is_counted_as_what_it_runs(tiny: Path, items: list[Rendered]) -> None:
    model = load_base(tiny, torch.float32, CPU)
    sizes: list[int] = []
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda m, args, out: sizes.append(args[0].numel()))
    for share in (True, False):
        for packed in (longest_packed(model), 0):
            layout = Layout(share, packed)
            sizes.clear()
            answer_logits(model, layout.collate(items[:5]))
            assert layout.size(items[:5]) == sum(sizes)
