"""The baseline on a GPU: `Trainer` + PEFT + `generate` on the same random rows, and the timing of
scoring and replies of both sides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from backfire.base import Rendered
from backfire.evaluate.inference import read
from backfire.experiment import Experiment
from backfire.model.batching import plain
from backfire.model.quantize import quantizer
from backfire.rng import derive, stream
from backfire.train.precision import compute_type
from benchmarks.baseline import Example, collate
from benchmarks.gpu_load import LEARNING_RATE, NEW_TOKENS, NUM_PROMPTS, Load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_CANDIDATES, BATCH, REPETITIONS = 3, 32, 2
_SHARED = 32


class Questions:
    """Random prompts of different lengths that share an opening, and the candidates of each, which
    are single tokens."""

    def __init__(self, load: Load, vocabulary: int, count: int = NUM_PROMPTS) -> None:
        rng = stream(0, "bench", "prompts")

        def tokens(number: int) -> list[int]:
            return [rng.randrange(3, vocabulary) for _ in range(number)]

        opening, most = tokens(_SHARED), max(load.length - _SHARED, 2)
        lengths = [rng.randint(max(1, most // 8), most) for _ in range(count)]
        self.prompts = [opening + tokens(length) for length in lengths]
        self.candidates = [[[token] for token in tokens(NUM_CANDIDATES)] for _ in range(count)]


def evaluation(model: PreTrainedModel, load: Load) -> dict[str, Any]:
    """Seconds of scoring and replies by both sides on one model, and how their results differ."""
    vocabulary = model.config.vocab_size
    questions, few = Questions(load, vocabulary), Questions(load, vocabulary, 4)
    model.eval()
    sides = {ours: list[float](), theirs: list[float]()}
    for work in sides:
        work(model, few)  # to warm up
    results = {}
    for turn in range(REPETITIONS):
        for work in list(sides)[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            results[work] = work(model, questions)
            sides[work].append(time.perf_counter() - begin)
    seconds = [median(times) for times in sides.values()]
    (scores, replies), (their_scores, their_replies) = results[ours], results[theirs]
    pairs = [pair for a, b in zip(scores, their_scores, strict=True) for pair in zip(a, b)]
    return {
        "evaluation_seconds": seconds[0],
        "baseline_evaluation_seconds": seconds[1],
        "score_difference": max(abs(a - b) for a, b in pairs),
        "equal_replies": sum(map(list.__eq__, replies, their_replies)) / len(replies),
    }


def ours(model: PreTrainedModel, questions: Questions) -> tuple[list[Any], list[list[int]]]:
    """Scores and replies by backfire; random models write no end token, so all replies are equally
    long."""
    readings = read(
        model, questions.prompts, candidates=questions.candidates, max_new_tokens=NEW_TOKENS
    )
    return [r.scores for r in readings], [r.reply for r in readings]


def theirs(model: PreTrainedModel, questions: Questions) -> tuple[list[Any], list[list[int]]]:
    """Scores and replies as without backfire, so with transformers' own attention."""
    base, name = plain(model), plain(model).config._attn_implementation
    base.set_attn_implementation("sdpa")
    try:
        return _scores(model, questions), _replies(model, questions)
    finally:
        base.set_attn_implementation(name)


@torch.inference_mode()
def _scores(model: PreTrainedModel, questions: Questions) -> list[tuple[float, ...]]:
    """In batches, longest first; with lm-eval's shortcut, as in `baseline_eval`: candidates of one
    token share the row of their prompt."""
    scores: list[tuple[float, ...]] = [()] * len(questions.prompts)
    for index in _batches([len(ids) for ids in questions.prompts]):
        ids, mask = _padded([questions.prompts[i] for i in index], model.device)
        logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        for line, i in zip(logprobs, index, strict=True):
            answers = torch.tensor([answer for [answer] in questions.candidates[i]])
            last = len(questions.prompts[i]) - 1
            scores[i] = tuple(line[last, answers.to(model.device)].tolist())
    return scores


@torch.inference_mode()
def _replies(model: PreTrainedModel, questions: Questions) -> list[list[int]]:
    """By `generate`, in batches, longest first."""
    prompts = questions.prompts
    replies: list[list[int]] = [[] for _ in prompts]
    for index in _batches([len(ids) for ids in prompts]):
        ids, mask = _padded([prompts[i] for i in index], model.device, left=True)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
        for i, line in zip(index, written[:, ids.shape[1] :].tolist(), strict=True):
            replies[i] = line
    return replies


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def _padded(
    rows: Sequence[list[int]], device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    lines = []
    for row in rows:
        blank = [0] * (width - len(row))
        lines.append((blank + row, [0] * len(blank) + [1] * len(row)))
        if not left:
            lines[-1] = (row + blank, [1] * len(row) + [0] * len(blank))
    ids, mask = zip(*lines, strict=True)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Marks(TrainerCallback):  # type: ignore[misc]
    """The time after the warm-up and at the end, with the GPU idle."""

    def __init__(self, load: Load, device: torch.device) -> None:
        self.load, self.device, self.times = load, device, dict[int, float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step in (self.load.warm_up, self.load.warm_up + self.load.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times[state.global_step] = time.perf_counter()


def train(
    cell: Experiment,
    base: Path,
    rows: Sequence[Rendered],
    load: Load,
    device: torch.device,
    folder: Path,
) -> float:
    """Seconds per step of `Trainer` + PEFT as users write it: mixed precision, SDPA, fused AdamW,
    no gradient checkpointing."""
    steps, on_gpu = load.warm_up + load.steps, device.type == "cuda"
    paged = cell.method.paged() and on_gpu
    trainer = Trainer(
        model=_model(cell.method, base, device),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=load.batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type=cell.train.schedule,
            warmup_steps=round(cell.train.warmup_share * steps),
            optim="paged_adamw_32bit" if paged else "adamw_torch_fused",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not on_gpu,
            bf16=compute_type("auto", device) == "bfloat16",
        ),
        train_dataset=[Example(row.ids, row.num_prompt) for row in rows],
        data_collator=collate,
    )
    marks = _Marks(load, device)
    trainer.add_callback(marks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    first, last = marks.times[load.warm_up], marks.times[steps]
    return (last - first) / load.steps


def _model(method: Any, base: Path, device: torch.device) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    settings = method.quantization(device.type)
    extra = {"quantization_config": quantizer(settings)} if settings else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        str(base), dtype=dtype, device_map={"": str(device)}, **extra
    )
    if settings:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, target_modules=method.targets, task_type="CAUSAL_LM"
    )
    torch.manual_seed(derive(0, "adapter"))
    tuned: PreTrainedModel = get_peft_model(model, config)
    return tuned
