"""Make a small Gemma 2 or OLMo 2 of a dense Llama, and train it: random weights tell nothing.

    python benchmarks/train_post_norm.py gemma2|olmo2 DIR [--model DIR] [--steps 1000] [--device cpu]

Both put a norm between what attention and MLP give and the residual; OLMo 2 has none before them. Weights
begin as the Llama's and norms as what those give on a first text. The text is the builtin one, English and
Python of the standard library, without its held-out part.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from training import train
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from marlin_convert.calibration import calibrate

MODEL = Path(__file__).parents[1] / "examples" / "tinypy-4m"
LENGTH, BATCH = 512, 16
RATE = 5e-4
KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def rms(x: Tensor) -> Tensor:
    """The root of the mean square of all of x."""
    return x.float().pow(2).mean().sqrt()


@torch.no_grad()
def sizes(dense: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """The root mean square, on a text, of what linears and MLPs give and of what norms are given, by path."""
    found: dict[str, Tensor] = {}
    for name, module in dense.named_modules():
        if name.endswith(("_proj", "mlp")):
            module.register_forward_hook(lambda _, args, output, name=name: found.update({name: rms(output)}))
        elif name.endswith("layernorm"):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: rms(args[0])}))
    dense(input_ids=ids)
    return found


@torch.no_grad()
def gemma2(dense: LlamaForCausalLM, size: dict[str, Tensor]) -> PreTrainedModel:
    """A Gemma 2 that begins near the Llama: its embeddings, and so its residual, are sqrt(hidden) larger."""
    settings = {name: getattr(dense.config, name) for name in KEPT}
    model = Gemma2ForCausalLM(
        Gemma2Config(
            **settings,
            hidden_activation="silu",
            query_pre_attn_scalar=dense.config.head_dim,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        )
    )
    model.load_state_dict(dense.state_dict(), strict=False)
    larger = dense.config.hidden_size**0.5
    for number, (layer, old) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        at = f"model.layers.{number}"
        layer.input_layernorm.weight.copy_(old.input_layernorm.weight - 1)
        layer.pre_feedforward_layernorm.weight.copy_(old.post_attention_layernorm.weight - 1)
        layer.post_attention_layernorm.weight.fill_(larger * size[f"{at}.self_attn.o_proj"] - 1)
        layer.post_feedforward_layernorm.weight.fill_(larger * size[f"{at}.mlp"] - 1)
    model.model.norm.weight.copy_(dense.model.norm.weight - 1)
    return model


@torch.no_grad()
def olmo2(dense: LlamaForCausalLM, size: dict[str, Tensor]) -> PreTrainedModel:
    """An OLMo 2 that begins near the Llama: weights take in the norms that it has not."""
    settings = {name: getattr(dense.config, name) for name in KEPT if name != "head_dim"}
    model = Olmo2ForCausalLM(Olmo2Config(**settings))
    model.load_state_dict(dense.state_dict(), strict=False)
    for number, (layer, old) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        at = f"model.layers.{number}"
        before = old.input_layernorm.weight / size[f"{at}.input_layernorm"]
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.mul_(before)
        layer.self_attn.q_norm.weight.fill_(size[f"{at}.self_attn.q_proj"])
        layer.self_attn.k_norm.weight.fill_(size[f"{at}.self_attn.k_proj"])
        before = old.post_attention_layernorm.weight / size[f"{at}.post_attention_layernorm"]
        layer.mlp.gate_proj.weight.mul_(before)
        layer.mlp.up_proj.weight.mul_(before)
        layer.post_attention_layernorm.weight.fill_(size[f"{at}.self_attn.o_proj"])
        layer.post_feedforward_layernorm.weight.fill_(size[f"{at}.mlp"])
    return model


def main() -> None:
    """Train, say the loss on the way, and save in bfloat16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["gemma2", "olmo2"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    dense = LlamaForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    ids = calibrate(tokenizer, "builtin", samples=chosen.steps * BATCH, length=LENGTH, seed=0).ids
    begun = {"gemma2": gemma2, "olmo2": olmo2}[chosen.kind](dense, sizes(dense, ids[:BATCH]))
    model = begun.to(chosen.device).train()
    train(model, ids, batch=BATCH, rate=RATE, last=0.04, say=50)
    model.to(torch.bfloat16).save_pretrained(chosen.directory)
    tokenizer.save_pretrained(chosen.directory)


if __name__ == "__main__":
    main()
