"""Small random checkpoints of architectures outside the fused decoder, for tests of what runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW_IN_ONE = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
}

SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 4}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "phi": ("phi", HEADS),
    "phi3": ("phi3", HEADS),
    "phi3 longrope": ("phi3", HEADS | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "stablelm": ("stablelm", HEADS),
    "starcoder2 window": ("starcoder2", HEADS | {"sliding_window": 7}),
    "cohere": ("cohere", HEADS | {"logit_scale": 1.0}),
    "cohere2 window": ("cohere2", HEADS | WINDOW_IN_ONE | {"logit_scale": 1.0}),
    "granite": ("granite", HEADS | {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "olmo2": ("olmo2", HEADS),
    "olmo3 window": ("olmo3", HEADS | WINDOW_IN_ONE),
    "gemma": ("gemma", HEADS | {"head_dim": 16}),
    "gemma3 window": ("gemma3_text", HEADS | WINDOW_IN_ONE | {"head_dim": 24, "rope_parameters": GEMMA3_ROPE}),
    "glm4": ("glm4", HEADS | {"head_dim": 8}),
    "nemotron": ("nemotron", HEADS),
    "smollm3": ("smollm3", HEADS | {"no_rope_layers": [1, 0]}),
    "qwen2_moe": ("qwen2_moe", HEADS | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", HEADS | EXPERTS | {"head_dim": 8}),
    "mixtral window": ("mixtral", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}
"""Name to `model_type` and the fields of its config that differ from those of `write`."""


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "softcap": ("gemma2", HEADS | {"head_dim": 8}, "soft-capped"),
    "sinks": ("gpt_oss", HEADS | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 5}, "attention sinks"),
    "MLA": (
        "deepseek_v3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
        }
        | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
        "layer 0 attends with Q, K and V of the shapes",
    ),
    "uneven groups": ("olmo2", {"num_attention_heads": 4, "num_key_value_heads": 3}, "3 KV heads cannot serve 4 query"),
    "not causal": ("bert", {"num_attention_heads": 4}, "its logits are not those of its own attention"),
    "old attention classes": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "interface"),
    "attention not pluggable": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "layers \\[\\]"),
    "several attentions in a layer": ("diffllama", HEADS, "layers \\[0, 0, 1, 1\\]"),
    "window that the code ignores": ("phimoe", HEADS | {"num_local_experts": 4, "sliding_window": 5}, "window None"),
}
"""As `SUPPORTED`, and a part of the message."""


def write(folder: Path, model_type: str, fields: dict[str, Any]) -> PreTrainedModel:
    """Write a checkpoint whose every weight is random, and large enough that logits differ by whole units."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if "n_embd" in fields:
        common = {name: value for name, value in common.items() if name == "vocab_size" or "token" in name}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**common, **fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model
