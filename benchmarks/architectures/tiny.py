"""Tiny models of any type that transformers has: its own config class, sizes cut, flags and patterns kept."""

import dataclasses
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES,
)

# What sizes are called, and what they are here.
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "d_model": 128,
    "n_embd": 128,
    "dim": 128,
    "embed_dim": 128,
    "model_dim": 128,
    "embedding_size": 128,
    "dim_model": 128,
    "emb_dim": 128,
    "attention_hidden_size": 128,
    "lru_width": 128,
    "w": 128,
    "out_hidden_size": 128,
    "text_hidden_size": 128,
    "projection_dim": 128,
    "intermediate_size": 256,
    "ffn_dim": 256,
    "d_ff": 256,
    "dim_ff": 256,
    "n_inner": 256,
    "ffn_hidden_size": 256,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "feed_forward_size": 256,
    "block_ff_dim": 256,
    "intermediate_size_mlp": 256,
    "dense_intermediate_size": 256,
    "mlp_hidden_size": 256,
    "moe_intermediate_size": 128,
    "expert_ffn_hidden_size": 128,
    "shared_expert_intermediate_size": 128,
    "shared_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "expert_hidden_size": 128,
    "moe_latent_size": 64,
    "zero_expert_num": 2,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 4,
    "n_layers": 4,
    "num_decoder_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_blocks": 4,
    "depth": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
    "attention_head_dim": 32,
    "kv_channels": 32,
    "global_head_dim": 32,
    "d_kv": 32,
    "attention_head_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "num_expert_group": 1,
    "num_local_experts_per_tok": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "o_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_first_k_dense": 1,
    "mlp_only_layers": [],
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "ssm_state_size": 16,
    "mamba_d_ssm": 256,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "state_size": 16,
    "num_mamba_heads": 8,
    "mamba_headdim": 32,
    "mamba_dt_rank": 16,
    "n_mamba_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_head_dim": 32,
    "linear_num_heads": 4,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "seq_length": 512,
    "max_seq_len": 512,
    "block_size": 16,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "ngram_vocab_size": 64,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 4096,
    "num_kv_shared_layers": 2,
    "laurel_rank": 16,
    "adapter_rank": 16,
    "lora_rank": 16,
    "word_embed_proj_dim": 128,
    "rotary_dim": 16,
    "rot_dim": 16,
    "bottleneck": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "crop_size": 32,
    "num_image_tokens": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [0, 1],
    "num_global_layers": 1,
    "max_source_positions": 64,
    "max_target_positions": 128,
    "deepstack_layer_indexes": [0, 1],
    "window_size": 16,
}


def _sections(*sizes: int) -> dict[str, Any]:
    """Rope of a text part with a section each for time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}
    return {"text_config": {"rope_parameters": rope}}


# Sizes that the names alone do not settle.
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128}},
    "chameleon": {"vocabulary_map": {"<image>": 400}},
    "emu3": {"vocabulary_map": {"<image>": 400}},
    "cosmos3_edge": _sections(6, 5, 5),
    "cosmos3_omni": _sections(6, 5, 5),
    "ernie4_5_vl_moe": _sections(6, 6, 4),
    "glm4v": _sections(4, 6, 6),
    "glm46v": _sections(4, 6, 6),
    "glm_ocr": _sections(4, 6, 6),
    "glmga": _sections(4, 6, 6),
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "moe_topk": [2, 2, 2, 2],
        "num_shared_expert": [1, 1, 1, 1],
    },
    "hunyuan_vl": {"text_config": {"head_dim": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm5_next": {"text_config": {"index_topk": 16, "index_kpool": 4}},
    "qwen3_omni_moe_thinker": {"text_config": {"vocab_size": 4096}},
    "dots3_note": {"text_config": {"per_layer_config": None}},
    "dots3_note_text": {"per_layer_config": None},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        }
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "head_dim": 16,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "v_head_dim": 32,
        "num_attention_heads": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "ministral": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32},
    "paddleocr_vl": _sections(4, 6, 6),
    "qwen2_vl": _sections(4, 6, 6),
    "qwen2_5_vl": _sections(4, 6, 6),
    "qwen2_5_omni_thinker": _sections(4, 6, 6),
    "reformer": {"is_decoder": True},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "hc_count": 4,
            "hc_lowrank": 16,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 4,
        "hc_lowrank": 16,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 8,
    },
    "zamba": {
        "num_hidden_layers": 8,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "linear_attention",
        ],
    },
    "dbrx": {"max_seq_len": 128},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "gemma4": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        }
    },
    "nemotron_h_omni": {"video_temporal_patch_size": None},
}

# As unlike each other as they can be: fused and parallel parts, mixers of every kind, shared keys and values,
# inputs per layer, latent attention, towers in each of the ways that names have had, experts in each of the
# ways that files have them; but for those that tests/test_experts.py converts.
SAMPLE = (
    "bamba", "bloom", "deepseek_v3", "falcon_h1", "gemma3", "gemma4_text", "glm_moe_dsa", "gpt_oss",
    "llama", "minimax_m3_vl", "phi3", "qwen3_5", "recurrent_gemma",
)  # fmt: skip

# More than this is not tiny.
MOST = 250_000_000


def types() -> list[str]:
    """Every model type that generates text, from text alone or from images and text."""
    return sorted({*TEXT, *IMAGES})


def build(model_type: str) -> PreTrainedModel:
    """A model of this type with random weights, in float32."""
    name = IMAGES.get(model_type) or TEXT[model_type]
    of = getattr(transformers, name if isinstance(name, str) else name[0])
    settings = config(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))
    wanted = getattr(of, "config_class", None)
    if wanted is not None and not isinstance(settings, wanted):
        part = settings.get_text_config(decoder=True)
        settings = part if isinstance(part, wanted) else settings
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in of(settings).parameters())
    if size > MOST:
        raise RuntimeError(f"the tiny model has {size:,} parameters")
    torch.manual_seed(0)
    model = of._from_config(settings, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        wild = not parameter.isfinite().all() or parameter.abs().max() > 1e3
        if parameter.dim() >= 2 and (wild or parameter.abs().max() == 0):
            parameter.data = torch.randn(parameter.shape) * 0.02
        elif wild:
            parameter.data = torch.ones_like(parameter)
    for buffer in model.buffers():  # bounds of a clamp, say, which no release leaves infinite
        if buffer.is_floating_point():
            buffer.nan_to_num_(posinf=100.0, neginf=-100.0)
    return model


def config(of: type, changes: dict[str, Any]) -> PreTrainedConfig:
    """A config of this class, with every size that is known cut, and of its parts likewise."""
    changes = dict(changes)
    fields = {field.name: field for field in dataclasses.fields(of)}
    settings = {}
    for name in fields:
        default = _default(fields[name])
        if (small := _small(name, default, fields, getattr(of, "attribute_map", None) or {})) is not None:
            settings[name] = small
    for part, kind in (getattr(of, "sub_configs", None) or {}).items():
        more = changes.pop(part, {})
        named = part in ("text_config", "vision_config", "audio_config", "llm_config")
        if not isinstance(kind, type) or not dataclasses.is_dataclass(kind) or kind.__name__ == "AutoConfig":
            kind = _kind(of, part) if named else None
        if kind is not None:
            settings[part] = config(kind, more)
    return of(**settings | changes)


def _kind(of: type, part: str) -> type | None:
    """The class that a part of a config has by default."""
    try:
        return type(getattr(of(), part))
    except Exception:  # a class may need arguments
        return None


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _small(name: str, default: Any, fields: dict[str, Any], called: dict[str, str]) -> Any:
    """What a setting is here, None where it stays."""
    key = name
    if key not in SIZES:
        key = next((other for other, own in called.items() if own == name and other in SIZES), name)
    if key in SIZES and default is not None and not isinstance(default, bool):
        return _cut(key, default, SIZES[key], fields)
    if re.fullmatch(r"(pad|bos|eos|sep|cls|mask|unk)_token_id", name) and isinstance(default, int):
        return {"pad": 0, "bos": 1, "eos": 2}.get(name[:3], 3)
    if re.search(r"token_(id|index)$|_tok_id$|_token_ids?$", name) and isinstance(default, int):
        return 4000 + list(fields).index(name) % 90 if default > 3900 else None
    if name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(default, list | tuple):
        return (list(dict.fromkeys(default)) * 4)[:4]
    return None


def _cut(key: str, default: Any, size: Any, fields: dict[str, Any]) -> Any:
    if isinstance(default, int) and isinstance(size, int):
        if key in ("num_key_value_heads", "num_kv_heads") and default > 1:
            names = ("num_attention_heads", "n_heads", "n_head", "num_heads")
            heads = next((fields[one].default for one in names if one in fields), None)
            return 4 if heads == default else 2
        return min(size, default) if default > 0 else default
    if isinstance(default, list | tuple):
        if isinstance(size, list):
            return size
        if default and isinstance(default[0], int):
            return type(default)(min(size, one) for one in default)[:4]
        return None
    return size if isinstance(default, int | float) else None
