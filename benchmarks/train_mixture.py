"""Train a small mixture of experts (Qwen3-MoE) on the builtin text: random weights tell nothing of quality.

    python benchmarks/train_mixture.py DIR [--tokenizer DIR] [--hidden 256] [--layers 4] [--experts 8]
        [--steps 600] [--device cpu]

The builtin text is English and Python of the standard library; its held-out part is left out.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from marlin_convert.calibration import calibrate

TOKENIZER = Path(__file__).parents[1] / "examples" / "tinypy-4m"
LENGTH, BATCH = 256, 8
RATE = 1e-3


def main() -> None:
    """Train, say the loss on the way, and save in bfloat16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=chosen.hidden, num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.hidden // 64, num_key_value_heads=chosen.hidden // 128, head_dim=64,
        num_experts=chosen.experts, num_experts_per_tok=2, moe_intermediate_size=chosen.hidden,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(chosen.device).train()
    ids = calibrate(tokenizer, "builtin", samples=chosen.steps * BATCH, length=LENGTH, seed=0).ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.perf_counter()
    for step in range(chosen.steps):
        warm, done = min(1.0, (step + 1) / 50), step / chosen.steps
        optimizer.param_groups[0]["lr"] = RATE * warm * (0.55 + 0.45 * math.cos(math.pi * done))
        batch = ids[step * BATCH : (step + 1) * BATCH].to(chosen.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(
                f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(chosen.directory)
    tokenizer.save_pretrained(chosen.directory)


if __name__ == "__main__":
    main()
