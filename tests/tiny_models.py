"""Tiny random models of every family, with the attention variants the real ones have."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

TOKENIZER = Path(__file__).parent.parent / "examples" / "tinypy-4m"

SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# family -> (configuration class, what differs from SMALL)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "tie_word_embeddings": True, **SLIDING}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, **SLIDING}),
    "phi3": ("Phi3Config", {"sliding_window": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 1.0,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            **SLIDING,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"query_pre_attn_scalar": 32, "tie_word_embeddings": True, "num_key_value_heads": 1, **SLIDING},
    ),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.02,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
}

# no width is a multiple of 256, key and value have 64 outputs: the shapes of Qwen2.5-0.5B and Gemma-3-1B
NARROW = {
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model whose norms, biases and weights are all random, so that none of them can be forgotten."""
    name, differences = FAMILIES[family]
    settings = SMALL | differences | changes
    if name in ("Phi3Config", "Olmo2Config", "GraniteConfig"):  # these split the hidden size over the heads
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.06 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def save(model: PreTrainedModel, directory: Path, **settings: Any) -> Path:
    """A model directory as it would come from the Hub, tokenizer included."""
    model.save_pretrained(directory, **settings)
    for path in TOKENIZER.glob("tokenizer*.json"):
        shutil.copyfile(path, directory / path.name)
    return directory


def text(directory: Path) -> Path:
    """A calibration text of some 4000 tokens, much quicker to read than the builtin one."""
    path = directory / "text.txt"
    shutil.copyfile(TOKENIZER.parents[1] / "LICENSE", path)
    return path


def headers_only(config: PreTrainedConfig, directory: Path) -> Path:
    """A checkpoint whose tensors are holes in a file: they take no room on the disk."""
    with torch.device("meta"):
        shapes = {
            name: list(tensor.shape)
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    said = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        file.truncate(8 + len(said) + end)
    config.save_pretrained(directory)
    return directory
