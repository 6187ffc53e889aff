"""Tiny random models of the families that transformers has, and what plain transformers makes of a
row: alone, without padding and without anything remembered."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
WINDOW = 8
_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "linear_num_value_heads", "mamba_chunk_size"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(
        ("v_head_dim", "rotary_dim", "state_size", "mamba_n_heads", "mamba_d_state"), 8
    ),
    **dict.fromkeys(("mamba_d_head", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("attention_window_size", "chunk_size"), WINDOW),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "resid_pdrop"), 0.0),
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("hidden_dropout", "residual_dropout", "summary_first_dropout"), 0.0),
    **dict.fromkeys(("input_jitter_noise", "router_jitter_noise"), 0.0),
    **{"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "qk_head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mamba_d_ssm": 64},
    **{"is_decoder": True, "use_cache": True, "first_k_dense_replace": 1},
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLVED = {"layer_types": ["conv", "full_attention"] * 2}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONG |= {"rope_theta": 1e4, "original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
WITH_LATENT = {"num_key_value_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # Windows, in all layers or in some.
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "starcoder2": ("starcoder2", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 5.0}),
    "gemma3_text": ("gemma3_text", {}),
    "gpt_oss": ("gpt_oss", {}),
    "olmo3": ("olmo3", {}),
    "cohere2": ("cohere2", {"logit_scale": 0.5}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}),
    "llama4_text": ("llama4_text", {"floor_scale": 4}),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 8}),
    "moshi": ("moshi", {}),
    # Positions: learned, biases by distance, counted from the mask or absent.
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "xglm": ("xglm", {}),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "falcon": ("falcon", {"alibi": True}),
    "gptj": ("gptj", {}),
    "ctrl": ("ctrl", {}),
    "bart": ("bart", {}),
    "marian": ("marian", {}),
    "roberta": ("roberta", {}),
    "bert": ("bert", {}),
    "roformer": ("roformer", {}),
    # Angles that depend on how long the row is.
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 24}),
    # Logits that are scaled, latent attention, experts.
    "granite": ("granite", {"logits_scaling": 2.0}),
    "deepseek_v3": ("deepseek_v3", WITH_LATENT),
    "deepseek_v32": ("deepseek_v32", {**WITH_LATENT, "index_topk": 16, "index_head_dim": 8}),
    "olmoe": ("olmoe", {}),
    # Recurrent states, in all layers or in some; no memory that can be used.
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8}),
    "falcon_mamba": ("falcon_mamba", {}),
    "recurrent_gemma": ("recurrent_gemma", {}),
    "qwen3_next": ("qwen3_next", HYBRID),
    "qwen3_5_text": ("qwen3_5_text", HYBRID),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": ("bamba", {"attn_layer_indices": [1, 3]}),
    "lfm2": ("lfm2", CONVOLVED),
    "rwkv": ("rwkv", {}),
    "openai-gpt": ("openai-gpt", {}),
}


def tiny_model(kind: str, **settings: Any) -> Any:
    """A model of this `model_type` with random weights and a window of eight tokens, if it has
    one; in evaluation mode."""
    known = AutoConfig.for_model(kind).to_dict()
    shape = {name: value for name, value in _SHAPE.items() if name in known}
    config = AutoConfig.for_model(kind, **{**shape, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():  # so that no layer is zero
            if weight.dim() > 1 and weight.std() < 0.05:
                torch.nn.init.normal_(weight, std=0.2)
    return model.float().eval()


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of one row [token, vocab], alone."""
    found: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found.float()


def likelihood(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Of the answer after the prompt, in nats."""
    table = logits(model, [*prompt, *answer]).double().log_softmax(-1)
    return sum(float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


def reply(model: Any, prompt: Sequence[int], count: int, stops: Collection[int]) -> list[int]:
    """The greedy continuation."""
    ids = list(prompt)
    for _ in range(count):
        token = int(logits(model, ids)[-1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]
