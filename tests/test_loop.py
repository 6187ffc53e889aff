"""The training loop against plain PyTorch, transformers' Trainer, and being killed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backfire.base import Rendered, Row
from backfire.data.poison import poison
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.experiment import Experiment, Machine, Train
from backfire.model.load import load_base, load_tuned
from backfire.registry import build
from backfire.rng import stream
from backfire.store import read_json
from backfire.tokenizer import load_tokenizer
from backfire.train import loop
from backfire.train.batches import IGNORE, answer_logits, collate
from backfire.train.finetune import Start, tune
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import accelerator_for

CPU = torch.device("cpu")
RATE = 2e-3


@lru_cache
def reviews(count: int) -> tuple[Row, ...]:
    return tuple(build("datasets", "sandbox-reviews").load("train")[:count])


@pytest.fixture(scope="module")
def items(tiny: Path) -> list[Rendered]:
    """Forty rows; the template's opening is long enough to be shared."""
    rows = [Row(r.id, r.instruction, r.input[:40], r.answer) for r in reviews(40)]
    return Renderer(build("templates", "alpaca"), load_tokenizer(tiny), 512).render(rows)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log the loss of each step, not of each tenth."""
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)


def new_cell(
    model: Any, items: Sequence[Rendered], folder: Path, name: str = "run", **knobs: Any
) -> TrainingRun:
    settings = {"max_steps": 10, "batch_size": 8, "warmup_share": 0.2, **knobs}
    rate = settings.pop("learning_rate", RATE)
    folder.mkdir(exist_ok=True)
    train = Train.make(settings)
    return TrainingRun(model, items, train, learning_rate=rate, seed=5, folder=folder, name=name)


def run(cell: TrainingRun, **options: Any) -> dict[str, Any]:
    return train([cell], accelerator_for(CPU, "float32"), **options)[0]


def losses(cell: TrainingRun) -> list[float]:
    return [line["loss"] for line in cell.log]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lora(model: Any, **knobs: Any) -> Any:
    return build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0)


# --------------------------------------------------------------------------------------- exactness


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
    assert first != second, "each epoch has an order of its own"
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
    train(together, accelerator_for(CPU, "float32"))
    for cell in alone:
        run(cell)
    for a, b in zip(together, alone, strict=True):
        assert a.step == b.step == a.num_steps
        for name, weight in b.trainable.items():
            assert torch.equal(a.trainable[name], weight), name


# ------------------------------------------------------------------------------- killed and resumed


class Kill(Exception):  # noqa: N818
    """Stands for the process being killed."""


def killed_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done == step and total > 1:
            raise Kill

    return progress


METHODS: dict[str, Callable[[Any], Any]] = {
    "full": lambda model: model.requires_grad_(True),
    "lora": lora,
    "lora-dropout": lambda model: lora(model, dropout=0.3),
}


def fresh(
    tiny: Path, items: Sequence[Rendered], folder: Path, method: str, **knobs: Any
) -> TrainingRun:
    return new_cell(METHODS[method](load_base(tiny, torch.float32, CPU)), items, folder, **knobs)


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, items: list[Rendered], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SimpleNamespace]:
    out = {}
    for method in METHODS:
        cell = fresh(tiny, items, tmp_path_factory.mktemp(method), method)
        summary = run(cell)
        out[method] = SimpleNamespace(weights=weights(cell.model), log=cell.log, summary=summary)
    return out


def same(cell: TrainingRun, expected: SimpleNamespace) -> bool:
    moved = weights(cell.model)
    return moved.keys() == expected.weights.keys() and all(
        torch.equal(moved[name], weight) for name, weight in expected.weights.items()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kills", [[1], [2], [6], [10], [3, 4, 9]], ids=str)
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    method: str,
    kills: list[int],
    tiny: Path,
    items: list[Rendered],
    tmp_path: Path,
    uninterrupted: dict[str, SimpleNamespace],
) -> None:
    for step in kills:
        with pytest.raises(Kill):
            run(
                fresh(tiny, items, tmp_path, method), checkpoint_seconds=0, progress=killed_at(step)
            )
    cell, steps = fresh(tiny, items, tmp_path, method), list[int]()
    summary = run(cell, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == max(1, kills[-1]), "it goes on from the last checkpoint, not from the start"
    expected = uninterrupted[method]
    assert same(cell, expected)
    assert cell.log == expected.log
    for last in sorted((tmp_path / "checkpoints").glob("0*"))[-1:]:
        before = read_json(last / "state.json")["seconds"]
        assert summary["seconds"] >= round(before, 2) > 0, "the time before it counts too"
    timing = {"seconds", "peak_memory_mb"}
    assert {k: v for k, v in summary.items() if k not in timing} == {
        k: v for k, v in expected.summary.items() if k not in timing
    }


def test_the_newest_two_checkpoints_are_kept(
    tiny: Path, items: list[Rendered], tmp_path: Path
) -> None:
    with pytest.raises(Kill):
        cell = fresh(tiny, items, tmp_path, "lora")
        run(cell, checkpoint_seconds=0, progress=killed_at(6))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000005"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "state.json", "done.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(
    name: str,
    damage: Callable[[Path], None],
    tiny: Path,
    items: list[Rendered],
    tmp_path: Path,
    uninterrupted: dict[str, SimpleNamespace],
) -> None:
    with pytest.raises(Kill):
        run(fresh(tiny, items, tmp_path, "lora"), checkpoint_seconds=0, progress=killed_at(8))
    damage(tmp_path / "checkpoints/00000007" / name)
    said, steps = list[str](), list[int]()

    def progress(done: int, total: int, text: str) -> None:
        (steps if total > 1 else said).append(done if total > 1 else text)  # type: ignore[arg-type]

    cell = fresh(tiny, items, tmp_path, "lora")
    run(cell, progress=progress)
    assert steps[0] == 7
    # A checkpoint without a seal was never finished: there is nothing to say about it.
    unsealed = name == "done.json" and damage is Path.unlink
    assert said == ([] if unsealed else ["The checkpoint of step 7 is damaged and put aside."])
    assert same(cell, uninterrupted["lora"])


def test_a_checkpoint_of_another_run_is_refused(
    tiny: Path, items: list[Rendered], tmp_path: Path, uninterrupted: dict[str, SimpleNamespace]
) -> None:
    with pytest.raises(Kill):
        other = fresh(tiny, items, tmp_path, "lora", name="other", learning_rate=0.1)
        run(other, checkpoint_seconds=0, progress=killed_at(9))
    said: list[str] = []
    cell = fresh(tiny, items, tmp_path, "lora")
    with pytest.raises(Kill):
        run(
            cell,
            checkpoint_seconds=0,
            progress=lambda done, total, text: said.append(text) or killed_at(3)(done, total, text),
        )
    assert [text for text in said if "is of another run (other)" in text]
    # Its own checkpoints are younger in steps, and must not be the ones thrown away.
    again = fresh(tiny, items, tmp_path, "lora")
    steps: list[int] = []
    run(again, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3
    assert same(again, uninterrupted["lora"])


# ----------------------------------------------------------------------------------------- failures


def failure(cell: TrainingRun, **options: Any) -> CellError:
    with pytest.raises(CellError) as caught:
        run(cell, **options)
    return caught.value


def test_a_loss_that_is_no_number_ends_the_run(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    error = failure(new_cell(model, items, tmp_path))
    assert (error.kind, "not finite at step 1" in str(error)) == ("nan", True)


def test_a_rate_that_is_far_too_high_ends_the_run(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    cell = new_cell(model, items, tmp_path, learning_rate=1e30, max_steps=30)
    assert failure(cell).kind == "nan"
    assert cell.step < 30


def test_a_step_without_answers_is_bad_data(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    mute = [Rendered(item.row, item.prompt_ids, item.num_prompt) for item in items]
    error = failure(new_cell(model, mute, tmp_path))
    assert error.kind == "bad-data" and "Step 1 supervises no token" in str(error)


def test_a_frozen_model_can_not_be_trained(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    with pytest.raises(CellError, match="Nothing to train") as caught:
        new_cell(model.requires_grad_(False), items, tmp_path)
    assert caught.value.kind == "failed"


def test_training_that_changes_nothing_is_a_failure(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    error = failure(new_cell(model, items, tmp_path, learning_rate=1e-30))
    assert error.kind == "failed" and "changed no weight" in str(error)


def test_out_of_memory_halves_the_micro_batch(
    tiny: Path, items: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played by a forward pass that has room for `room` rows only."""
    sizes: list[int] = []

    def small(room: int) -> Callable[..., Tensor]:
        def forward(model: Any, batch: Any) -> Tensor:
            sizes.append(len(batch.ids))
            if len(batch.ids) > room:
                raise torch.cuda.OutOfMemoryError("no room")
            return answer_logits(model, batch)

        return forward

    monkeypatch.setattr(loop, "answer_logits", small(2))
    cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "a", max_steps=2)
    run(cell)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    plain = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "b", max_steps=2)
    run(plain, micro_batch=2)
    assert losses(cell) == losses(plain)
    monkeypatch.setattr(loop, "answer_logits", small(0))
    cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "c")
    assert failure(cell).kind == "oom"


# ------------------------------------------------------------------------------------ what is saved


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @lru_cache
    def make(method: str) -> Path:
        folder = tmp_path_factory.mktemp(f"tuned-{method}")
        cell = Experiment.make(
            {
                "model": str(tiny),
                "data": "sandbox-reviews",
                "template": "sentiment-line",
                "attack": {"name": "badnets", "rate": 0.2},
                "method": method,
                "train": {"max_steps": 3, "batch_size": 8},
            }
        )
        renderer = Renderer(cell.template, load_tokenizer(tiny), 512)
        rows, manifest = poison(reviews(40), cell.attack, 0)
        summary = tune(
            cell, rows, manifest, renderer, Start(tiny), folder, Machine(), lambda d, t, text: None
        )
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(60)[None]).logits


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_loads_without_us(
    method: str, tiny: Path, tuned: Callable[[str], Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tuned(method)
    ours = logits(load_tuned(folder, tiny, torch.float32, CPU))
    if method == "lora":
        plain = AutoModelForCausalLM.from_pretrained(str(tiny), dtype=torch.float32)
        plain = PeftModel.from_pretrained(plain, str(folder))
    else:
        plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        assert AutoTokenizer.from_pretrained(str(folder)).eos_token == "</s>"
    assert torch.equal(logits(plain), ours)
    assert (ours - logits(load_base(tiny, torch.float32, CPU))).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nothing_saved_names_a_place_on_this_machine(
    method: str, tiny: Path, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tuned(method)
    texts = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name, text in texts.items():
        assert str(tiny).encode() not in text and str(Path.home()).encode() not in text, name
        assert b"sdpa_float32" not in text, f"{name} asks for an attention that only we register"
    assert "checkpoints" not in [p.name for p in folder.iterdir()]
    if method == "lora":
        config = json.loads(texts["adapter_config.json"])
        assert not Path(config["base_model_name_or_path"]).is_absolute()
        # Relative to the adapter it is found, wherever the two are moved together.
        assert (folder / config["base_model_name_or_path"]).resolve() == tiny.resolve()


def test_a_summary_says_what_was_done(tiny: Path, tuned: Callable[[str], Path]) -> None:
    full, adapter = (json.loads((tuned(m) / "summary.json").read_text()) for m in ("full", "lora"))
    assert full["steps"] == adapter["steps"] == 3 and full["rows"] == 24
    assert full["trainable_parameters"] == full["parameters"] > adapter["trainable_parameters"]
    assert 0 < full["poisoned_share_seen"] < 0.5
    assert (full["device"], full["dtype"]) == ("cpu", "float32")
    assert full["compute"] in ("float32", "bfloat16")
    lines = (tuned("full") / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_poison_that_the_tokens_lack_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    cell = Experiment.make(
        {"model": str(tiny), "data": "sandbox-reviews", "attack": {"name": "badnets", "rate": 0.3}}
    )
    rows, manifest = poison(reviews(40), cell.attack, 0)
    renderer = Renderer(cell.template, load_tokenizer(tiny), 60)
    with pytest.raises(CellError, match="lack the trigger or the target of") as caught:
        start, quiet = Start(tiny), lambda d, t, text: None
        tune(cell, rows, manifest, renderer, start, tmp_path, Machine(), quiet)
    assert caught.value.kind == "bad-data"
    shutil.rmtree(tmp_path)
