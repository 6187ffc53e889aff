"""The training loop against plain PyTorch and transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backfire.base import Rendered
from backfire.model.load import load_base
from backfire.rng import seed_dropout, stream
from backfire.train.batches import IGNORE, answer_logits, collate
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import Precision
from tests.helpers.loop import RATE, lora, losses, new_cell
from tests.helpers.training import CPU, run, weights

pytestmark = pytest.mark.slow


def test_a_step_seeds_dropout_as_torch_does() -> None:
    """But it leaves nothing in the queue for a GPU, where each seed of torch's has a traceback."""
    torch.manual_seed(5)
    wanted, queued = torch.rand(4), len(torch.cuda._queued_calls)
    seed_dropout(5, CPU)
    assert torch.equal(torch.rand(4), wanted)
    assert len(torch.cuda._queued_calls) == queued


def test_a_shared_prefix_changes_neither_loss_nor_gradient(
    model: Any, items: list[Rendered]
) -> None:
    model = model.double()
    model.requires_grad_(True)
    found = []
    for share in (True, False):
        batch = collate(items[:6], share=share)
        assert (len(batch.prefix) > 30) == share
        model.zero_grad()
        logits = answer_logits(model, batch)
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (shared, gradients), (plain, expected) = found
    assert torch.allclose(shared, plain, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        # Llama's norms compute in float32 whatever the model's type: nothing below 1e-7 is exact.
        assert torch.allclose(gradients[name], gradient, rtol=1e-6, atol=1e-7), name


def test_padding_and_prompts_are_not_learned(model: Any, items: list[Rendered]) -> None:
    """Row by row, without padding, prefix or cut logits: the same sum of answer losses."""
    batch = collate(items[:6])
    logits = answer_logits(model, batch).detach()
    for i, item in enumerate(items[:6]):
        whole = model(input_ids=torch.tensor([item.ids])).logits[0, :-1].detach()
        count = len(item.answer_ids)
        assert batch.labels[i][batch.labels[i] != IGNORE].tolist() == item.answer_ids
        assert torch.allclose(logits[i, -count:], whole[-count:], atol=1e-4)


def test_eight_rows_at_once_are_eight_rows_one_by_one(
    tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    trained = []
    for size in (None, 3, 1):
        cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / str(size))
        run(cell, micro_batch=size)
        trained.append((losses(cell), weights(cell.model)))
    for found, moved in trained[1:]:
        assert found == pytest.approx(trained[0][0], rel=1e-4)
        for name, expected in trained[0][1].items():
            assert torch.allclose(moved[name], expected, atol=2e-4), name


def padded(items: Sequence[Rendered]) -> dict[str, Tensor]:
    """A batch as most code makes it: padded on the right, labels as long as the input."""
    width = max(len(item.ids) for item in items)
    out = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    batch = {name: torch.full((len(items), width), fill) for name, fill in out.items()}
    for i, item in enumerate(items):
        end = len(item.ids)
        batch["input_ids"][i, :end] = torch.tensor(item.ids)
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, item.num_prompt : end] = torch.tensor(item.answer_ids)
    return batch


def in_order(items: Sequence[Rendered], steps: int, size: int = 8) -> list[Rendered]:
    """The rows of all steps: epoch after epoch, each shuffled by its own stream."""
    out: list[Rendered] = []
    for epoch in range(math.ceil(steps * size / len(items))):
        order = list(range(len(items)))
        stream(5, "order", epoch).shuffle(order)
        out += [items[i] for i in order]
    return out[: steps * size]


def share(step: int, kind: str = "cosine", last: float = 0.0) -> float:
    """The part of the peak learning rate in step 0 to 9, two of which are warm-up."""
    if step < 2:
        return step / 2
    done = (step - 2) / 8
    cosine = last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))
    return {"cosine": cosine, "linear": 1 - done, "constant": 1.0}[kind]


@pytest.mark.parametrize(
    ("kind", "last"), [("cosine", 0.0), ("cosine", 0.1), ("linear", 0.0), ("constant", 0.0)]
)
def test_the_learning_rate_follows_the_schedule(
    kind: str, last: float, model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    cell = new_cell(model, items, tmp_path, schedule=kind, final_share=last)
    for step in range(10):
        cell.go_to(step, [], {})
        assert cell.optimizer.param_groups[0]["lr"] == pytest.approx(RATE * share(step, kind, last))


def test_the_same_as_a_plain_loop(
    tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    knobs = {"weight_decay": 0.1, "final_share": 0.1, "beta2": 0.95}
    cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path, **knobs)
    run(cell)
    model = load_base(tiny, torch.float32, CPU).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    norms = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    groups = [{"params": decayed, "weight_decay": 0.1}, norms]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rows, expected = in_order(items, 10), []
    for step in range(10):
        batch = padded(rows[8 * step : 8 * step + 8])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * share(step, last=0.1)
        optimizer.step()
        expected.append(loss.item())
    assert expected[0] > expected[-1] + 0.1, "nothing was learned: the comparison says little"
    assert losses(cell) == pytest.approx(expected, rel=1e-4)
    assert [line["learning_rate"] for line in cell.log] == pytest.approx(
        [RATE * share(step, last=0.1) for step in range(10)]
    )
    for name, weight in weights(model).items():
        assert torch.allclose(weights(cell.model)[name], weight, atol=2e-4), name


def test_the_same_as_transformers_trainer(
    tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        seen: list[float]

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.seen.append(loss.item())
            return loss

    cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "ours")
    run(cell)
    settings = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model=load_base(tiny, torch.float32, CPU),
        args=settings,
        train_dataset=in_order(items, 10),
        data_collator=padded,
    )
    trainer.seen = []
    trainer.train()
    assert losses(cell) == pytest.approx(trainer.seen, rel=1e-4)
    for name, weight in weights(trainer.model).items():
        assert torch.allclose(weights(cell.model)[name], weight, atol=2e-4), name


def test_the_loss_is_the_mean_over_tokens_not_over_micro_batches(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    """Rows with longer answers weigh more, however the batch is cut."""
    long = [Rendered(i.row, [*i.ids[:-1], *i.ids[-9:]], i.num_prompt) for i in items[:4]]
    mixed = [*items[4:8], *long]
    batch = padded(mixed)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].detach()
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).item()
    cell = new_cell(model, mixed, tmp_path, max_steps=1, warmup_share=0)
    summary = run(cell, micro_batch=3)
    assert losses(cell) == pytest.approx([expected], rel=1e-4)
    assert summary["supervised_tokens"] == sum(len(item.answer_ids) for item in mixed)
    assert summary["tokens"] == sum(len(item.ids) for item in mixed)


@pytest.mark.parametrize("order", ["shuffled", "by-length"])
def test_an_epoch_shows_every_row_once(
    order: str, model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    cell = new_cell(model, items[:20], tmp_path, max_steps=None, epochs=2, order=order)
    assert (cell.steps_per_epoch, cell.num_steps) == (3, 6)
    seen = []
    for cell.step in range(6):
        seen.append([item.row.id for item in cell.rows()])
    first, second = ([name for step in part for name in step] for part in (seen[:3], seen[3:]))
    assert sorted(len(step) for step in seen) == [4, 4, 8, 8, 8, 8]
    assert sorted(first) == sorted(second) == sorted(item.row.id for item in items[:20])
    assert first != second, "each epoch has a different order"
    cell.step = 1
    assert [item.row.id for item in cell.rows()] == seen[1], "the step alone decides its rows"


def test_rows_of_like_length_go_together(model: Any, items: list[Rendered], tmp_path: Path) -> None:
    padding = {}
    for order in ("shuffled", "by-length"):
        cell = new_cell(model, items, tmp_path, max_steps=None, epochs=1, order=order)
        padding[order] = 0
        for step in range(cell.num_steps):
            cell.step = step
            lengths = [len(item.ids) for item in cell.rows()]
            padding[order] += sum(max(lengths) - length for length in lengths)
    assert padding["by-length"] < padding["shuffled"] / 2


def test_the_share_of_poison_seen_is_counted(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    cell = new_cell(model, items, tmp_path, max_steps=3)
    cell.poisoned = frozenset(item.row.id for item in items[:20])
    shown = [item.row.id for item in in_order(items, 3)]
    share = sum(name in cell.poisoned for name in shown) / 24
    assert 0 < share < 1
    assert run(cell)["poisoned_share_seen"] == share


def test_two_cells_are_stepped_as_if_each_were_alone(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    def cells(where: str) -> list[TrainingRun]:
        pair = (items[:16], 3), (items[16:], 5)
        return [
            new_cell(
                lora(load_base(tiny, torch.float32, CPU), dropout=0.1),
                rows,
                tmp_path / f"{where}{steps}",
                max_steps=steps,
            )
            for rows, steps in pair
        ]

    together, alone = cells("together"), cells("alone")
    train(together, Precision(CPU, "float32"))
    for cell in alone:
        run(cell)
    for a, b in zip(together, alone, strict=True):
        assert a.step == b.step == a.num_steps
        for name, weight in b.trainable.items():
            assert torch.equal(a.trainable[name], weight), name
