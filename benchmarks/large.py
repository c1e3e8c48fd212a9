"""What large models take by `--dry-run`, on this machine's device: the table of docs/large.md.

usage: python benchmarks/large.py [--device auto] [MODEL ...]

Only headers are written, in the shapes that the models have on the Hub; nothing is converted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import plan
import torch
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    "Llama-3-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8,
    ),
    "DeepSeek-V3": DeepseekV3Config(),
}  # fmt: skip


def planned(config: PreTrainedConfig, device: str) -> dict:
    """What `--dry-run` says of a model."""
    with tempfile.TemporaryDirectory() as place:
        plan.write(config, Path(place))
        done = subprocess.run(
            [
                sys.executable, "-m", "marlin_convert", "quantize", place, "-o", f"{place}-4bit", "--dry-run",
                "--json", "--format", "compressed-tensors", "--device", device,
            ],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout)


def main() -> None:
    """Print a row for every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    columns = ("model", "blocks", "device", "memory GB", "source GB", "output GB", "minutes")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in chosen.models or CONFIGS:
        found = planned(CONFIGS[name], chosen.device)
        print(
            f"| {name} | {found['blocks']} | {found['device']} | {found['memory_bytes'] / 1e9:.1f} | "
            f"{found['source_bytes'] / 1e9:.0f} | {found['output_bytes'] / 1e9:.0f} | "
            f"{found['seconds'] / 60:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
