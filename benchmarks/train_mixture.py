"""Make a small mixture of experts (Mixtral) of a dense Llama, and train it: random weights tell nothing.

    python benchmarks/train_mixture.py DIR [--model DIR] [--experts 8] [--steps 300] [--device cpu]

Every expert begins as the dense MLP without half of its hidden units, others for each, behind a router of
random weights (sparse upcycling, arXiv 2212.05055). The text is the builtin one, English and Python of the
standard library, without its held-out part.
"""

import argparse
from pathlib import Path

import torch
from training import train
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from marlin_convert.calibration import calibrate

MODEL = Path(__file__).parents[1] / "examples" / "tinypy-4m"
LENGTH, BATCH = 256, 8
RATE = 1e-3


def mixture(dense: LlamaForCausalLM, experts: int) -> MixtralForCausalLM:
    """The mixture that training begins with."""
    settings = dense.config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = MixtralConfig(
        **{name: settings[name] for name in kept}, num_local_experts=experts, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.02, sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
        gate, up, down = (getattr(old.mlp, f"{name}_proj").weight.data for name in ("gate", "up", "down"))
        for number in range(experts):
            kept_units = torch.rand(len(gate)) < 0.5
            layer.mlp.experts.gate_up_proj.data[number] = torch.cat([gate, up * kept_units[:, None]])
            layer.mlp.experts.down_proj.data[number] = down * 2
        layer.mlp.gate.weight.data.normal_(0, 0.05)
    return model


def main() -> None:
    """Train, say the loss on the way, and save in bfloat16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    dense = LlamaForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    model = mixture(dense, chosen.experts).to(chosen.device).train()
    ids = calibrate(tokenizer, "builtin", samples=chosen.steps * BATCH, length=LENGTH, seed=0).ids
    train(model, ids, batch=BATCH, rate=RATE, last=0.1, say=20)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(chosen.directory)
    tokenizer.save_pretrained(chosen.directory)


if __name__ == "__main__":
    main()
