"""Tiny random models as they are on the Hub, processors included, in sizes that vLLM takes on a CPU."""

import json
from pathlib import Path
from typing import Any

import diverse_models
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 4224}
# what differs from the models of other tests, by type
CHANGES: dict[str, dict[str, Any]] = {
    # vLLM has no Qwen3 of which some layers slide
    "qwen3": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    "smollm3": {},
    "olmo3": {"vocab_size": 4224},
    "gemma3_text": {},
    "qwen3_5_text": DELTA,
    "gemma3": {"vocab_size": 4224, "query_pre_attn_scalar": 32},
    "qwen3_moe": {"vocab_size": 4224},
    "mixtral": {"vocab_size": 4224},
    "deepseek_v3": {
        "vocab_size": 4224,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",  # without the word vLLM takes softmax
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "head_dim": 64,
    },
    # on a CPU vLLM has no kernel for experts that read scaled tokens
    "llama4_text": {
        "vocab_size": 4224,
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "attention_chunk_size": 128,
    },
    "mistral3": {"vocab_size": 4224},
    "qwen3_5": DELTA,
}
# What stands for pictures in a text: the names that the tokenizer has for it, and those that the config has.
PICTURES: dict[str, dict[str, tuple[str, str]]] = {
    "gemma3": {
        "boi_token": ("<start_of_image>", "boi_token_index"),
        "eoi_token": ("<end_of_image>", "eoi_token_index"),
        "image_token": ("<image_soft_token>", "image_token_index"),
    },
    "mistral3": {
        "image_token": ("[IMG]", "image_token_index"),
        "image_break_token": ("[IMG_BREAK]", ""),
        "image_end_token": ("[IMG_END]", ""),
    },
    "qwen3_5": {
        "image_token": ("<|image_pad|>", "image_token_id"),
        "video_token": ("<|video_pad|>", "video_token_id"),
        "vision_bos_token": ("<|vision_start|>", "vision_start_token_id"),
        "vision_eos_token": ("<|vision_end|>", "vision_end_token_id"),
    },
}
QWEN_SIZES = {
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
}
PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 32, "width": 32},
        },
    },
    "mistral3": {
        "processor_config.json": {
            "processor_class": "PixtralProcessor",
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 32},
            "patch_size": {"height": 8, "width": 8},
        },
    },
    "qwen3_5": {
        "processor_config.json": {"processor_class": "Qwen3VLProcessor"},
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_SIZES},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **QWEN_SIZES},
    },
}


def make(model_type: str, directory: Path) -> Path:
    """A model of this type, in bfloat16; a wrong weight changes its answers by more than arithmetic does."""
    changes = CHANGES[model_type]
    if model_type in tiny_models.FAMILIES:
        model = tiny_models.build(model_type, **changes)
    else:
        model = diverse_models.build(model_type, **changes)
        if CHANGES[model_type] is not DELTA:  # whose answers are far enough from one another
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    tiny_models.save(model.to(torch.bfloat16), directory)
    if model_type in PICTURES:
        _add_pictures(model_type, directory)
    return directory


def _add_pictures(model_type: str, directory: Path) -> None:
    """What a wrapper has beside a text model: tokens that stand for pictures, and processors."""
    tokens = PICTURES[model_type]
    tokenizer = AutoTokenizer.from_pretrained(
        tiny_models.TOKENIZER, extra_special_tokens={name: token for name, (token, _) in tokens.items()}
    )
    config = json.loads((directory / "config.json").read_text())
    for token, key in tokens.values():
        if key:
            config[key] = tokenizer.convert_tokens_to_ids(token)
    if model_type == "gemma3":
        tokenizer.add_tokens(["\n" * count for count in (1, 2, 3, 4)])  # vLLM looks for them around a picture
        config["mm_tokens_per_image"] = 4
        _as_on_the_hub(config, directory / "model.safetensors")
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    for name, settings in PROCESSORS[model_type].items():
        (directory / name).write_text(json.dumps(settings))


def _as_on_the_hub(config: dict[str, Any], shard: Path) -> None:
    """Gemma 3's vision tower has a level more there, and no head."""
    config["vision_config"]["vision_use_head"] = False
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(shard).items()
        if ".head." not in name
    }
    save_file(tensors, shard, {"format": "pt"})
