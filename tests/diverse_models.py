"""Tiny random models of many kinds: mixers, shared keys and values, per-layer inputs, towers for images."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HYBRID = ["linear_attention", "full_attention"] * 2
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_chunk_size": 16,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": HYBRID,
}
GEMMA_3N = {
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 512,
    "num_kv_shared_layers": 2,
    "laurel_rank": 32,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    "intermediate_size": [256] * 4,
    **SLIDING,
}

EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}

ABSENT = object()
# what differs from SMALL, by type
TEXT: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 16},
    "cohere2": SLIDING,
    "diffllama": {},
    "deepseek_v3": {
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "exaone4": SLIDING,
    "falcon": {"head_dim": ABSENT, "new_decoder_architecture": True},
    "falcon_h1": MAMBA,
    "gemma3n_text": GEMMA_3N,
    "gemma4_unified_text": {"num_kv_shared_layers": 2, "global_head_dim": 32, **SLIDING},
    "glm_moe_dsa": {
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "indexer_types": ["full", "shared"] * 2,
        "index_topk": 8,
        "index_n_heads": 2,
        "index_head_dim": 32,
    },
    "gpt_bigcode": {"n_inner": 256},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size_mlp": 256,
        "moe_layers": [1, 3],
        "attention_chunk_size": 8,
    },
    "minicpm3": LATENT,
    "mixtral": {"num_local_experts": 4},
    "modernbert-decoder": {"local_attention": 8},
    "mpt": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 128,
        "mamba_num_heads": 4,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
    "olmo3": SLIDING,
    "olmo_hybrid": DELTA,
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_text": DELTA,
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "qwen3_next": {**DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 128},
    "recurrent_gemma": {"lru_width": 128, "attention_window_size": 8},
    "starcoder2": {},
    "xglm": {"ffn_dim": 256},
    "youtu": LATENT,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_TOWER = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 128}
# the text part's settings and the tower's, by type
IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (SLIDING, TOWER),
    "idefics3": ({"model_type": "llama"}, TOWER),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **TOWER}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 32, **TOWER}),
    "qwen2_vl": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}},
        {**QWEN_TOWER, "hidden_size": 128},
    ),
    "step3p7": (
        {
            **EXPERTS,
            "n_routed_experts": 4,
            "share_expert_dim": 128,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "swiglu_limits": [0.0, 0.0, 0.0, 0.05],
            "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.05],
            **SLIDING,
        },
        TOWER,
    ),
    "qwen3_5": (DELTA, QWEN_TOWER | {"intermediate_size": 128, "num_position_embeddings": 16}),
}


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model whose norms, biases and weights are all random, so that none of them can be forgotten."""
    torch.manual_seed(7)
    if model_type in TEXT:
        settings = SMALL | TEXT[model_type] | changes
        config = CONFIG_MAPPING[model_type](**{key: x for key, x in settings.items() if x is not ABSENT})
        model = AutoModelForCausalLM.from_config(config)
    else:
        text, tower = IMAGES[model_type]
        config = CONFIG_MAPPING[model_type](text_config=SMALL | text | changes, vision_config=tower)
        model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()
