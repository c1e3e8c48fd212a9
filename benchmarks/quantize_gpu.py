"""Seconds per decoder layer of a Llama-3-8B-shaped random model on one GPU: W4 g128, 128 x 2048 tokens.

usage: python benchmarks/quantize_gpu.py [--layers 2,6] [--efforts fast,default] [--peer] [--parts]

Whole commands are timed at two layer counts; their slope is what a layer costs, and 32 of them with what is
left over make an 8B model. `--parts` runs once more with every part of the work timed (the GPU is waited for
around each, so their sum is a little above the slope) beside a floor measured on the same chip. `--peer` runs
llm-compressor, which must be importable by this Python, on the same models and token ids.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import parts
import torch

HERE = Path(__file__).resolve().parent
TINYPY = HERE.parent / "examples" / "tinypy-4m"
SAMPLES, LENGTH = 128, 2048


def make_model(directory: Path, layers: int) -> Path:
    """A random 8B-shaped Llama of so many layers, with a small vocabulary's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINYPY).save_pretrained(directory)
    del model
    torch.cuda.empty_cache()
    return directory


def save_tokens(model: Path, path: Path) -> None:
    """The token ids that `quantize` takes, for the peer."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from marlin_convert.calibration import calibrate

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = calibrate(tokenizer, "builtin", samples=SAMPLES, length=LENGTH, seed=0).ids
    save_file({"input_ids": ids}, path)


def time_ours(model: Path, output: Path, effort: str) -> dict:
    """The whole command, as a user runs it."""
    started = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "marlin_convert",
            "quantize",
            str(model),
            "-o",
            str(output),
            "--samples",
            str(SAMPLES),
            "--sequence-length",
            str(LENGTH),
            "--effort",
            effort,
            "--json",
            "-q",
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    summary = json.loads(done.stdout)
    return {
        "command": time.perf_counter() - started,
        "work": summary["seconds"],
        "replayed": summary["replayed"],
    }


def time_peer(model: Path, tokens: Path, output: Path) -> dict:
    """llm-compressor at its defaults, batches of 8."""
    started = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            str(HERE / "peers" / "llm_compressor.py"),
            str(model),
            str(tokens),
            str(output),
            "--batch-size",
            "8",
            "--device",
            "cuda",
            "--threads",
            "16",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return {"command": time.perf_counter() - started}


def time_parts(model: Path, output: Path, effort: str) -> None:
    """One conversion with the GPU waited for around every part."""
    from marlin_convert import recipe
    from marlin_convert.hub import resolve

    settings = {"samples": SAMPLES, "sequence_length": LENGTH, "effort": effort}
    job = parts.story.Job(
        resolve(str(model)),
        output,
        recipe.load(recipe.DEFAULT).changed(settings),
        torch.device("cuda:0"),
    )
    print(f"\n{effort}: parts, seconds per layer but the first")
    print(parts.table(*parts.convert(job)))
    print(f"  peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="2,6")
    parser.add_argument("--efforts", default="fast,default")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--parts", action="store_true")
    chosen = parser.parse_args()
    efforts = chosen.efforts.split(",")
    counts = [int(count) for count in chosen.layers.split(",")]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(HERE.parent):
        here = Path(temporary)
        results: dict[str, dict[int, dict]] = {name: {} for name in (*efforts, "llm-compressor")}
        for count in counts:
            model = make_model(here / f"model-{count}", count)
            for effort in efforts:
                results[effort][count] = time_ours(model, here / f"{effort}-{count}", effort)
                print(f"{effort}, {count} layers: {results[effort][count]}", flush=True)
            if chosen.peer:
                save_tokens(model, here / "tokens.safetensors")
                results["llm-compressor"][count] = time_peer(
                    model, here / "tokens.safetensors", here / f"peer-{count}"
                )
                print(f"llm-compressor, {count} layers: {results['llm-compressor'][count]}", flush=True)
        low, high = min(counts), max(counts)
        slopes = {}
        for who, runs in results.items():
            if low < high and high in runs:
                slopes[who] = (runs[high]["command"] - runs[low]["command"]) / (high - low)
                whole = runs[low]["command"] + slopes[who] * (32 - low)
                print(f"{who}: {slopes[who]:.2f} s per layer, {whole:.0f} s for 32 layers")
        for who, slope in slopes.items():
            print(f"{who} / {efforts[0]}, per layer: {slope / slopes[efforts[0]]:.2f}")
        for effort in efforts if chosen.parts else ():
            time_parts(here / f"model-{high}", here / f"parts-{effort}", effort)


if __name__ == "__main__":
    main()
