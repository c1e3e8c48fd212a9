"""Peak memory of `quantize` as the number of layers grows: flat, as one block is in memory at a time.

usage: python benchmarks/memory.py [--shape small] [--layers 2,4] [--device cpu|cuda] [--text 16x512]
       [--directory DIR]

Random Llamas, written layer by layer: `small` (hidden 1024, MLP 4096, 33 MB a layer, 16 x 512 tokens), and
with 2 x 512 tokens Llama-3's `8b` and `70b` (0.4 and 1.7 GB a layer, 2.1 and 4.2 GB beside). A process of its
own converts each; it reads its peaks from the operating system, and that of the GPU from torch. Models are
put in a directory inside of `--directory` that is removed at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from marlin_convert import recipe
from marlin_convert.commands.quantize import Job, quantize
from marlin_convert.estimate import estimate
from marlin_convert.hub import Source

TINYPY = Path(__file__).resolve().parents[1] / "examples" / "tinypy-4m"

# config, layer counts, and samples of 512 tokens
SHAPES: dict[str, tuple[dict[str, int], str, int]] = {
    "small": (
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 4096,
        },
        "4,8,16", 16,
    ),
    "8b": (
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256,
        },
        "2,4", 2,
    ),
    "70b": (
        {
            "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 128256,
        },
        "2,4", 2,
    ),
}  # fmt: skip


def make_model(shape: str, layers: int, directory: Path, device: torch.device) -> int:
    """A random model, a file for every layer; returns the bytes of its weights."""
    config = LlamaConfig(
        **SHAPES[shape][0], num_key_value_heads=8, num_hidden_layers=layers, dtype="bfloat16",
        max_position_embeddings=2048, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINYPY).save_pretrained(directory)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    torch.manual_seed(0)
    index = {}
    for layer, names in groupby(tensors, lambda name: name.split(".")[2] if ".layers." in name else name):
        random = {}
        for name in names:
            one = torch.empty(tensors[name].shape, dtype=torch.bfloat16, device=device)
            random[name] = one.normal_(0, 0.02).cpu() if one.dim() > 1 else one.fill_(1).cpu()
        file = directory / f"model-{layer}.safetensors"
        save_file(random, file)
        index |= dict.fromkeys(random, file.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def peak() -> int:
    """Bytes that this process had at the most since it was asked last; where that is forbidden, ever."""
    lines = Path("/proc/self/status").read_text().splitlines()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def convert(model: Path, output: Path, device: torch.device, text: str) -> dict[str, Any]:
    """What the process of one conversion has to say."""
    samples, length = map(int, text.split("x"))
    settings = {"samples": samples, "sequence_length": length, "format": "compressed-tensors"}
    source = Source(model, model.name, None)
    job = Job(source, output, recipe.load(recipe.DEFAULT).changed(settings), device)
    peaks = []

    def progress(numbers: Iterable[int], total: int) -> Iterator[int]:
        for number in numbers:
            yield number
            peaks.append(peak())

    started = time.perf_counter()
    done = quantize(job, progress)
    return {
        "seconds": time.perf_counter() - started,
        "host": [*peaks, peak()],
        "gpu": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "plan": estimate(done.plan, device).memory,
    }


def main() -> None:
    """Print a row for every number of layers, or be the process of one conversion."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--text", help="samples x tokens of each")
    parser.add_argument("--directory", type=Path, help="where models and checkpoints are put for the while")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    _, counts, samples = SHAPES[chosen.shape]
    text = chosen.text or f"{samples}x512"
    if chosen.one:
        print(json.dumps(convert(*chosen.one, chosen.device, text)))
        return
    columns = ("shape", "device", "layers", "model GB", "host peak GB", "in each layer and after",
               "GPU peak GB", "the plan said GB", "seconds")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for layers in map(int, (chosen.layers or counts).split(",")):
        with tempfile.TemporaryDirectory(dir=chosen.directory) as temporary:
            model = Path(temporary) / "model"
            size = make_model(chosen.shape, layers, model, chosen.device)
            words = ["--shape", chosen.shape, "--device", str(chosen.device)]
            done = subprocess.run(
                [sys.executable, __file__, *words, "--text", text, "--one", model, f"{model}-marlin"],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        gpu, plan = (f"{found[key] / 1e9:.2f}" for key in ("gpu", "plan"))
        most, each = max(found["host"]) / 1e9, " ".join(f"{one / 1e9:.2f}" for one in found["host"])
        print(
            f"| {chosen.shape} | {chosen.device} | {layers} | {size / 1e9:.2f} | {most:.2f} | {each} | "
            f"{gpu if chosen.device.type == 'cuda' else '-'} | {plan} | {found['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
