"""The baseline: the training of a cell as a competent user would write it, with `Trainer` and PEFT.

Nothing is slower than necessary: SDPA attention, fused AdamW, no checkpoints, no gradient
checkpointing, no KV cache, padding to the longest row of a batch only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from backfire.base import Row
from backfire.rng import derive, stream
from benchmarks.cells import Cell
from benchmarks.sides import Steps, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Example:
    """Tokens of one row; those from `num_prompt` on are the answer and the end token."""

    ids: list[int]
    num_prompt: int


def tokenize(cell: Cell, rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """Tokenize prompt and answer separately: the prompt's tokens must not depend on the answer."""
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False).input_ids
    prompt_ids, end = prompts(cell, rows, tokenizer), ends(cell, rows[0], tokenizer)
    return [Example([*p, *a, *end], len(p)) for p, a in zip(prompt_ids, answers, strict=True)]


def prompts(cell: Cell, rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts, by the chat template if that is the cell's template."""
    template = cell.experiment.template
    if template.name != "chat":
        ids: list[list[int]] = tokenizer([template.prompt(row) for row in rows]).input_ids
        return ids
    return [_chat(cell, row, tokenizer, ask=True) for row in rows]


def ends(cell: Cell, row: Row, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: EOS, or what the chat template writes after the answer, up to
    its last special token."""
    if cell.experiment.template.name != "chat":
        return [tokenizer.eos_token_id]
    [prompt_ids] = prompts(cell, [row], tokenizer)
    answer = tokenizer(row.answer, add_special_tokens=False).input_ids
    after = _chat(cell, row, tokenizer, ask=False)[len(prompt_ids) + len(answer) :]
    last = max(place for place, i in enumerate(after) if i in tokenizer.all_special_ids)
    return after[: last + 1]


def _chat(cell: Cell, row: Row, tokenizer: Any, *, ask: bool) -> list[int]:
    turns = [{"role": turn.role, "content": turn.content} for turn in row.messages]
    turns += [] if ask else [{"role": "assistant", "content": row.answer}]
    arguments: dict[str, Any] = cell.experiment.template.changed().get("arguments", {})
    return list(
        tokenizer.apply_chat_template(
            turns, add_generation_prompt=ask, return_dict=False, **arguments
        )
    )


class Recorder:
    """Makes a trainer keep the loss of every step as a tensor."""

    losses: list[Tensor]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        out = cast(Any, super()).compute_loss(*args, **kwargs)
        self.losses.append((out[0] if isinstance(out, tuple) else out).detach())
        return out


class PlainTrainer(Recorder, Trainer):  # type: ignore[misc]
    """`Trainer` that keeps its losses."""


class StepTimer(Steps, TrainerCallback):  # type: ignore[misc]
    """Records the time at the end of every step."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.mark()


def train(cell: Cell, folder: Path) -> Training:
    """Train on the cell's rows and save the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(str(cell.base))
    num_steps, examples = in_order(cell, tokenize(cell, cell.train, tokenizer))
    trainer = PlainTrainer(
        model=with_adapter(cell, load_base(cell.base)),
        args=TrainingArguments(**arguments(cell, folder, num_steps)),
        train_dataset=examples,
        data_collator=collate,
    )
    return run(trainer, folder)


def run(trainer: Any, folder: Path) -> Training:
    """Train, save the model and return the times and losses of the steps."""
    trainer.losses = []
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps := StepTimer())
    trainer.train()
    trainer.model.save_pretrained(str(folder))
    losses = {i: float(loss) for i, loss in enumerate(trainer.losses, start=1)}
    return Training(steps.total(), losses)


def arguments(cell: Cell, folder: Path, steps: int) -> dict[str, Any]:
    """The settings of the cell, as `TrainingArguments` names them."""
    experiment = cell.experiment
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": experiment.train.batch_size,
        "learning_rate": experiment.learning_rate,
        "lr_scheduler_type": experiment.train.schedule,
        "warmup_steps": round(experiment.train.warmup_share * steps),
        "weight_decay": experiment.train.weight_decay,
        "max_grad_norm": experiment.train.clip_norm,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": cell.device == "cpu",
        "bf16": cell.device == "cuda"
        or (cell.baseline_compute or experiment.train.compute) == "bfloat16",
    }


def in_order(cell: Cell, examples: Sequence[Example]) -> tuple[int, list[Example]]:
    """Number of optimizer steps, and the examples of all epochs in the order that backfire uses."""
    settings, count = cell.experiment.train, len(cell.train)
    per_epoch = count // settings.batch_size
    steps = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    order: list[int] = []
    for epoch in range(math.ceil(steps / per_epoch)):
        rows = list(range(count))
        stream(cell.experiment.seed, "order", epoch).shuffle(rows)
        order += rows
    return steps, [examples[i] for i in order[: steps * settings.batch_size]]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch padded on the right, with prompts and padding masked in the labels."""
    ids = [torch.tensor(e.ids) for e in examples]
    labels = [torch.tensor([-100] * e.num_prompt + e.ids[e.num_prompt :]) for e in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def load_base(folder: Path, device: str = "cpu") -> PreTrainedModel:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    return cast("PreTrainedModel", model.to(device))


def with_adapter(cell: Cell, model: PreTrainedModel) -> PreTrainedModel:
    method: Any = cell.experiment.method
    if method.name == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(derive(cell.experiment.seed, "adapter"))  # backfire's initial weights
    tuned: PreTrainedModel = get_peft_model(model, config)
    return tuned


def load(cell: Cell, folder: Path) -> PreTrainedModel:
    """The fine-tuned model in `folder`, or the base if `folder` is the base's."""
    if not (folder / "adapter_config.json").is_file():
        return load_base(folder).eval()
    from peft import PeftModel

    tuned: PreTrainedModel = PeftModel.from_pretrained(load_base(cell.base), str(folder))
    return tuned.eval()
