"""Peak memory of `quantize` as the number of layers grows: flat, as one block is in memory at a time.

usage: python benchmarks/memory.py [--device cpu|cuda]

Random Llamas of one width (hidden 1024, MLP 4096, 17 M parameters a layer) and 4, 8 and 16 layers, 16 x 512
calibration tokens. Each is converted by a process of its own, whose peak is read from the operating system.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
FORMATTER = argparse.RawDescriptionHelpFormatter


def make_model(directory: Path, layers: int) -> int:
    """A random model; returns the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        dtype="bfloat16",
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(HERE.parent / "examples" / "tinypy-4m").save_pretrained(directory)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def main() -> None:
    """Print a row for every number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    print(f"{'layers':>6} {'model MB':>9} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        for layers in (4, 8, 16):
            model = Path(temporary) / f"model-{layers}"
            size = make_model(model, layers)
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "marlin_convert",
                    "quantize",
                    str(model),
                    "-o",
                    f"{model}-marlin",
                    "-q",
                    "--device",
                    chosen.device,
                    "--samples",
                    "16",
                    "--sequence-length",
                    "512",
                ],
                cwd=HERE.parent,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"quantize failed with {process.returncode}")
            print(f"{layers:6} {size / 1e6:9.0f} {usage.ru_maxrss / 1024:8.0f}", flush=True)


if __name__ == "__main__":
    main()
