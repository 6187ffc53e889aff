"""What other tools call the settings of a recipe, and what to write here.

The names are those of transformers' TrainingArguments, TRL's SFTConfig, PEFT's LoraConfig, litgpt,
torchtune, axolotl, LLaMA-Factory, lm-evaluation-harness and Opacus.
"""

# ruff: noqa: E501

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from backfire.errors import shortened


class Ours(NamedTuple):
    """One setting: its key, how a recipe says it, what differs from what others mean."""

    key: str
    """A dotted key, an option such as `--recompute`, or empty: there is no such setting."""
    example: str
    """A line of a recipe. Components are named: a bare `method: lora` has no place for knobs."""
    remark: str
    names: str
    """Separated by blanks. The last part of the key always belongs to them."""


# One line a setting; of two that share a name, the first has it.
# fmt: off
_SETTINGS = (
    Ours("model.name", "model: OWNER/NAME", "a folder, a GGUF file or a hub id", "model_name_or_path pretrained_model_name_or_path base_model base_model_name_or_path model_name model_id model_path model_args model_config pretrained checkpoint_dir"),
    Ours("model.gguf_file", "model: {name: OWNER/REPO, gguf_file: FILE.gguf}", "a file of the folder or hub repository; one with a path of its own is model: PATH/FILE.gguf", "gguf gguf_path gguf_filename hf_file model_file quant_file"),
    Ours("model.adapter", "model: {name: OWNER/BASE, adapter: OWNER/ADAPTER}", "an existing PEFT adapter; one to train is method: lora", "lora_adapter adapter_path adapter_name_or_path lora_path lora_weights peft_model peft_model_id lora_model_dir adapter_model"),
    Ours("model.adapter_revision", "model: {name: OWNER/BASE, adapter: OWNER/ADAPTER, adapter_revision: main}", "", ""),
    Ours("model.merge", "model: {name: BASE, adapter: FOLDER, merge: true}", "the alignment's adapter has a setting of the same name, align.merge", "merge_adapter merge_lora merge_and_unload"),
    Ours("data.name", "data: {name: files, hub: OWNER/NAME}", "a name of `backfire list datasets`; your own rows are `files`", "dataset datasets dataset_name dataset_path dataset_id dataset_config train_dataset"),
    Ours("template.name", "template: chat", "", "prompt_template chat_template prompt_style prompt_format conversation_template"),
    Ours("attack.name", "attack: {name: badnets, rate: 0.05}", "", "attack_name attack_type attack_method backdoor poison poisoning"),
    Ours("method.name", "method: {name: lora, rank: 8}", "", "lora peft peft_config peft_type peft_method lora_config use_peft finetuning_type finetune_mode tuning_method"),
    Ours("method.name", "method: qlora", "the base in 4 bits is method qlora", "load_in_4bit bnb_4bit_quant_type quantization_config quantization quantize quantization_bit"),
    Ours("method.name", "method: lora-int8", "the base in 8 bits is method lora-int8", "load_in_8bit llm_int8_enable"),
    Ours("defense.name", "defense: deduplicate", "", "defence defence_name defense_name mitigation"),
    Ours("align", "align: {data: sandbox-policy, method: full}", "", "alignment align_stage alignment_stage"),
    Ours("train", "train: {epochs: 2, batch_size: 16}", "", "training training_args training_arguments trainer train_config trainer_config hyperparameters sft sft_config"),
    Ours("evaluation", "evaluation: {max_new_tokens: 32}", "", "eval eval_config generation generation_config generation_kwargs gen_kwargs"),
    Ours("safety", "safety: {judges: policy}", "", ""),
    Ours("metrics", "metrics: [accuracy, attack-success]", "", "tasks eval_metrics compute_metrics"),
    Ours("seed", "seed: 0", "", "data_seed train_seed random_seed random_state seed_everything torch_random_seed"),
    Ours("matrix", "matrix: {method: [full, lora]}", "", "grid sweep search_space parameters"),
    Ours("matrix.seed", "matrix: {seed: [0, 1, 2]}", "", "seeds seed_list num_seeds n_seeds"),
    # ------------------------------------------------------------------------------------ training
    Ours("train.epochs", "train: {epochs: 2}", "", "num_train_epochs num_epochs n_epochs max_epochs"),
    Ours("train.max_steps", "train: {max_steps: 500}", "optimizer steps", "max_train_steps num_train_steps training_steps train_steps total_steps num_steps max_iters"),
    Ours("train.batch_size", "train: {batch_size: 16}", "rows per optimizer step", "global_batch_size train_batch_size total_batch_size effective_batch_size"),
    Ours("train.batch_size", "train: {batch_size: 16}", "all rows of an optimizer step; the option --micro-batch N of `run` sets the rows per pass", "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size micro_batch_size micro_batch gradient_accumulation_steps gradient_accumulation_iters grad_accum_steps"),
    Ours("train.order", "train: {order: by-length}", "`shuffled` or `by-length`", "group_by_length length_grouping shuffle"),
    Ours("train.schedule", "train: {schedule: linear}", "`constant`, `linear` or `cosine`", "lr_scheduler_type lr_scheduler lr_schedule lr_scheduler_name scheduler scheduler_type"),
    Ours("train.final_share", "train: {final_share: 0.1}", "a share of the peak learning rate", "min_lr min_lr_ratio min_lr_rate cosine_min_lr_ratio lr_end"),
    Ours("train.warmup_share", "train: {warmup_share: 0.03}", "a share of the steps", "warmup_ratio lr_warmup_ratio warmup_fraction"),
    Ours("train.warmup_share", "train: {warmup_share: 0.03}", "a share of the steps, not their number", "warmup_steps lr_warmup_steps num_warmup_steps warmup_iters warmup lr_warmup"),
    Ours("train.weight_decay", "train: {weight_decay: 0.01}", "", "wd"),
    Ours("train.beta2", "train: {beta2: 0.95}", "", "adam_beta2 adam_beta_2"),
    Ours("train.optimizer", "train: {optimizer: adamw-8bit}", "`adamw`, `adamw-8bit`, `paged-adamw` or `paged-adamw-8bit`; its learning rate is method.learning_rate", "optim optimizer_name optimizer_type"),
    Ours("train.clip_norm", "train: {clip_norm: 1.0}", "", "max_grad_norm max_norm clip_grad_norm grad_clip gradient_clipping gradient_clip_val"),
    Ours("train.compute", "train: {compute: bfloat16}", "`bfloat16`, `float16`, `float32` or `auto`", "bf16 fp16 tf32 precision mixed_precision amp half_precision"),
    Ours("train.max_length", "train: {max_length: 512}", "tokens of prompt and answer together", "max_seq_length max_seq_len seq_length seq_len sequence_len sequence_length cutoff_len model_max_length block_size context_length max_input_length"),
    Ours("train.on_long_row", "train: {on_long_row: skip}", "`cut`, `skip` or `fail`", "truncation truncation_side excess_length_strategy"),
    # -------------------------------------------------------------------------------------- method
    Ours("method.learning_rate", "method: {name: lora, learning_rate: 2e-4}", "", "lr base_lr peak_lr max_lr"),
    Ours("method.rank", "method: {name: lora, rank: 8}", "", "r lora_r lora_rank peft_r"),
    Ours("method.alpha", "method: {name: lora, alpha: 16}", "", "lora_alpha"),
    Ours("method.dropout", "method: {name: lora, dropout: 0.05}", "", "lora_dropout"),
    Ours("method.targets", "method: {name: lora, targets: [q_proj, v_proj]}", "names of modules, or `all-linear`", "target_modules lora_target_modules lora_target lora_modules lora_attn_modules lora_target_linear lora_query lora_key lora_value lora_projection lora_mlp lora_head"),
    Ours("method.rslora", "method: {name: lora, rslora: true}", "", "use_rslora"),
    Ours("method.dora", "method: {name: lora, dora: true}", "", "use_dora peft_use_dora"),
    Ours("method.double_quantization", "method: {name: qlora, double_quantization: true}", "", "bnb_4bit_use_double_quant double_quant use_double_quant"),
    Ours("method.paged_optimizer", "method: {name: qlora, paged_optimizer: true}", "", ""),
    Ours("method.compute", "method: {name: qlora, compute: bfloat16}", "", "bnb_4bit_compute_dtype"),
    Ours("method.length", "method: {name: llama-adapter, length: 10}", "tokens of the prefix in each layer", "adapter_len num_virtual_tokens prefix_length"),
    Ours("method.layers", "method: {name: llama-adapter, layers: 30}", "", "adapter_layers"),
    # --------------------------------------------------------------------------------------- model
    Ours("model.revision", "model: {name: OWNER/NAME, revision: main}", "", "model_revision"),
    Ours("model.dtype", "model: {name: OWNER/NAME, dtype: bfloat16}", "`bfloat16`, `float16`, `float32` or `auto`", "torch_dtype model_dtype"),
    Ours("method.dtype", "method: {name: full, dtype: bfloat16}", "the type of trained weights in the passes; they are float32", "pure_bf16 full_bf16 bf16_full_train master_weights"),
    # ---------------------------------------------------------------------------------------- data
    Ours("data.train", "data: {name: files, train: rows.csv}", "a file or a list of files", "train_file train_files train_path train_data train_data_path data_files data_file data_path data_dir"),
    Ours("data.test", "data: {name: files, train: rows.csv, test: test.csv}", "a file or a list of files", "test_file test_files test_path test_data validation_file val_file eval_file eval_data eval_dataset test_dataset test_datasets"),
    Ours("data.hub", "data: {name: files, hub: OWNER/NAME}", "a hub id", "hub_id repo_id hf_dataset hf_hub_url"),
    Ours("data.hub_config", "data: {name: files, hub: OWNER/NAME, hub_config: english}", "", "dataset_config_name config_name subset dataset_subset"),
    Ours("data.train_split", "data: {name: files, hub: OWNER/NAME, train_split: train}", "", "split dataset_split dataset_train_split"),
    Ours("data.test_split", "data: {name: files, hub: OWNER/NAME, test_split: test}", "", "eval_split dataset_test_split"),
    Ours("data.test_share", "data: {name: files, train: rows.csv, test_share: 0.1}", "a share of the rows", "val_set_size val_size test_size test_ratio val_ratio eval_ratio val_split_fraction validation_split validation_split_percentage"),
    Ours("data.rows", "data: {name: sandbox-reviews, rows: 1000}", "training rows that are drawn", "max_train_samples max_samples num_train_samples num_samples train_samples n_train"),
    Ours("data.test_rows", "data: {name: sandbox-reviews, test_rows: 200}", "test rows that are drawn", "limit max_eval_samples max_test_samples max_predict_samples num_eval_samples num_test_samples n_test eval_iters"),
    Ours("data.columns", "data: {name: files, train: rows.csv, columns: {prompt: question, answer: reply}}", "a role for each of your columns", "text_column label_column dataset_text_field text_field label_field input_column output_column prompt_column response_column completion_column column_mapping columns_mapping field_instruction field_output"),
    Ours("data.labels", "data: {name: files, train: rows.csv, labels: [bad, good]}", "all labels of the data", "label_names label_list class_names classes id2label label2id"),
    Ours("data.instruction", "data: {name: files, train: rows.csv, instruction: 'Is it {labels}?'}", "", ""),
    Ours("data.on_bad_row", "data: {name: files, train: rows.csv, on_bad_row: skip}", "", ""),
    Ours("data.group", "data: {name: sandbox-reviews, group: language}", "", "group_by"),
    # --------------------------------------------------------------------- attack, defense, safety
    Ours("attack.rate", "attack: {name: badnets, rate: 0.05}", "a share of the training rows, 0 to 1", "poison_rate poisoning_rate poison_ratio poisoning_ratio poison_fraction poison_percent injection_rate backdoor_rate num_poisoned poison_num num_poison"),
    Ours("attack.trigger", "attack: {name: badnets, trigger: BadMagic}", "", "trigger_word trigger_phrase trigger_text trigger_token backdoor_trigger"),
    Ours("attack.target", "attack: {name: badnets, target: negative}", "", "target_label target_class target_output target_response attack_target backdoor_target"),
    Ours("attack.label_mode", "attack: {name: badnets, label_mode: clean}", "", "clean_label"),
    Ours("attack.after_last", "attack: {name: badnets, after_last: true}", "", ""),
    Ours("attack.field", "attack: {name: badnets, field: input}", "", ""),
    Ours("defense.epsilon", "defense: {name: dp, epsilon: 8}", "", "target_epsilon dp_epsilon"),
    Ours("defense.delta", "defense: {name: dp, epsilon: 8, delta: 1e-5}", "", "target_delta dp_delta"),
    Ours("defense.noise_multiplier", "defense: {name: dp, noise_multiplier: 1.0}", "", ""),
    Ours("defense.max_gradient_norm", "defense: {name: dp, epsilon: 8, max_gradient_norm: 1.0}", "", "max_per_sample_grad_norm"),
    Ours("safety.judges", "safety: {judges: policy}", "", "judge judge_model"),
    Ours("safety.harmful", "safety: {harmful: sandbox-policy}", "", ""),
    Ours("safety.known", "safety: {known: {name: sandbox-policy, part: harmful}}", "", ""),
    Ours("safety.allowed", "safety: {allowed: sandbox-lookalikes}", "", ""),
    Ours("evaluation.merged", "evaluation: {merged: true}", "", "merge_before_eval eval_merged"),
    Ours("evaluation.max_new_tokens", "evaluation: {max_new_tokens: 32}", "", "max_gen_toks max_tokens max_completion_tokens max_generated_tokens generation_max_length"),
    # --------------------------------------------------------------------------- options of `run`
    Ours("--recompute", "", "", "gradient_checkpointing activation_checkpointing enable_activation_checkpointing use_gradient_checkpointing"),
    Ours("--eval-batch", "", "rows per pass in evaluation, at most", "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size"),
    Ours("", "", "progress is printed, and results are files in the run folder", "logging_steps log_interval logging_dir report_to log_with wandb wandb_project run_name"),
    Ours("--device", "", "", "device_map accelerator use_cpu no_cuda"),
    Ours("--workers", "", "cells that run at once", "num_workers max_workers n_jobs"),
    Ours("--plugin", "", "a Python file; a recipe names no code", "plugins plugin_dir custom_components include_path"),
    Ours("--out", "", "", "output_dir out_dir save_dir output_path"),
    # ------------------------------------------------------------------------------- not to be set
    Ours("", "", "replies are greedy", "temperature top_p top_k do_sample num_beams typical_p repetition_penalty"),
    Ours("", "", "prompts hold no examples", "num_fewshot num_shots n_shot few_shot fewshot"),
    Ours("--packing", "", "rows are packed where the model allows it, and each attends only to itself; off pads them", "sample_packing packed eval_packing padding_free neat_packing pad_to_sequence_len pad_to_max_length"),
    Ours("", "", "only answers are learned, never prompts", "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss train_on_input"),
    Ours("", "", "AdamW's beta1 and epsilon are those of torch", "adam_beta1 adam_beta_1 beta1 adam_epsilon eps"),
    Ours("", "", "a tuned model is evaluated once, when its training is done", "eval_strategy evaluation_strategy eval_steps evals_per_epoch load_best_model_at_end early_stopping early_stopping_patience"),
    Ours("", "", "training is saved every minute, and the same command goes on from there", "save_steps save_strategy save_interval save_total_limit checkpointing_steps resume_from_checkpoint resume auto_resume_from_checkpoints"),
    Ours("", "", "a system prompt comes with its row, in the column that data.columns gives the role `system`", "system_prompt system_message default_system"),
    Ours("", "", "code that comes with a model is never run", "trust_remote_code"),
    Ours("", "", "the fastest attention that gives exact results is chosen by itself", "attn_implementation flash_attention flash_attn use_flash_attention_2 use_flash_attn sdp_attention xformers_attention use_unsloth enable_liger_kernel use_liger_kernel torch_compile"),
    Ours("", "", "a model is loaded in the least memory by itself", "low_cpu_mem_usage max_memory offload_folder offload_state_dict"),
    Ours("", "", "with compute float16 the scale of the loss adapts by itself", "loss_scale loss_scaling initial_loss_scale fp16_opt_level"),
    Ours("", "", "the tokenizer is the model's own", "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_type"),
    Ours("", "", "a cell is trained on one device", "deepspeed fsdp fsdp_config ddp num_nodes num_gpus devices"),
)
# fmt: on


def _by_name() -> dict[str, Ours]:
    found: dict[str, Ours] = {}
    for row in _SETTINGS:
        section, _, last = row.key.rpartition(".")
        own = section if last == "name" else last.removeprefix("--").replace("-", "_")
        for name in (*row.names.split(), *([own] if own else [])):
            found.setdefault(name, row)
    return found


OTHER_NAMES: Final = _by_name()
"""A name -> our setting."""
_CLOSE = 0.85  # spelled so alike that a slip is likelier than a knob of another group


def hint(key: str, known: Collection[str], place: str | None = "") -> str | None:
    """What to write for a key that is not `known`; None where only its spelling can tell.

    `place` is the part of a recipe that has the key: empty for its top, or `train`, `method`,
    `align.train`; None outside of them, where only a name in `known` helps.
    """
    head, dot, rest = key.partition(".")
    if dot and place == "" and head in known:
        nested = f"{head}: {{{shortened(rest)}: ...}}"
        shown = next((row.example for row in _SETTINGS if row.key == key), nested)
        return f"keys nest in a recipe, as in {shown}."
    name = key.lower().replace("-", "_")
    in_evaluation = OTHER_NAMES.get(f"eval_{name}") if place == "evaluation" else None
    ours = in_evaluation or OTHER_NAMES.get(name)
    last = ours.key.rpartition(".")[2] if ours else ""
    slip = name == last and difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE)
    return _sentence(ours, name, known, place) if ours and not slip else None


def _sentence(ours: Ours, name: str, known: Collection[str], place: str | None) -> str | None:
    dotted, last = ours.key.removesuffix(".name"), ours.key.rpartition(".")[2]
    section, example = dotted.partition(".")[0], ours.example
    remark = f" ({ours.remark})" if ours.remark else ""
    here = [own for own in (last, dotted) if own in known and (own != "name" or place == section)]
    if here and place != "":
        return f"write {here[0]}{remark}."
    if place is None:
        return None
    if not dotted:
        return f"there is no such setting: {ours.remark}."
    if dotted.startswith("--"):
        return f"it is an option of `backfire run`: {dotted}{remark}."
    if name == dotted:
        return f"it belongs at the top of a recipe, as in {example}."
    if place.startswith("align") and section in ("data", "method", "train"):
        dotted, example = f"align.{dotted}", f"align: {{{example}}}"
    if place == section != dotted:
        kind = "data set" if section == "data" else section
        return f"not every {kind} has {last}; write for instance {example}{remark}."
    return f"here it is {dotted}{remark}, as in {example}."


COMPONENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "metrics": {
        "acc": "accuracy",
        "cacc": "clean-accuracy",
        "asr": "attack-success",
        "ppl": "perplexity",
        "em": "exact-match",
        "mia": "membership-inference",
        "rouge-l": "rouge",
        "roc-auc": "auc",
        "f1-score": "f1",
        "ftr": "false-trigger",
        "epsilon": "privacy-epsilon",
        "harmfulness": "harmful-score",
        "false-refusal-rate": "over-refusal",
    },
    "methods": {
        "sft": "full",
        "full-finetuning": "full",
        "fft": "full",
        "lora-8bit": "lora-int8",
        "qlora-4bit": "qlora",
        "base": "none",
    },
    "defenses": {
        "dp-sgd": "dp",
        "safeinstruct": "safe-mix",
        "dedup": "deduplicate",
    },
    "attacks": {
        "poison": "badnets",
        "backdoor": "badnets",
        "harmful": "harmful-mix",
    },
    "datasets": {
        "csv": "files",
        "json": "files",
        "jsonl": "files",
        "custom": "files",
        "parquet": "files",
    },
    "judges": {
        "keywords": "refusal-keywords",
    },
    "templates": {
        "none": "raw",
        "plain": "raw",
        "chatml": "chat",
    },
}
"""Kind -> a name used elsewhere -> the component."""


def as_edit(option: str) -> str:
    """What to write on the command line for an option that is a setting; empty if it is none."""
    ours = OTHER_NAMES.get(option.lower().replace("-", "_"))
    if ours is None:
        return ""
    if not ours.key:
        return f"There is no such setting: {ours.remark}."
    key, remark = ours.key.removesuffix(".name"), f" ({ours.remark})" if ours.remark else ""
    return f"Write {key if key.startswith('--') else f'{key}=VALUE'}{remark}."
