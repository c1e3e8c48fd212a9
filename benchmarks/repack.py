"""Repacking a GPTQ checkpoint to MARLIN, beside copying the same bytes twice with sha256 and fsync.

    python benchmarks/repack.py [--blocks 13] [--vocabulary 32000] [--repeats 1] [--directory DIR]

A random checkpoint of Llama-3-8B's block shapes is made in a temporary directory, in shards of 1 GB (13
blocks are 2 GB in all), and read once so that it is in the page cache. What is timed is the whole command,
from the start of Python to its exit; the copies are plain Python, 1 MiB at a time. Both are run in turns. The
seconds of processor time tell what is left of either on a machine that others use.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from marlin_convert.checkpoint.writer import ShardWriter, TensorSpec
from marlin_convert.formats import gptq

HIDDEN, INTERMEDIATE, KEY_VALUE = 4096, 14336, 1024
GROUP_SIZE = 128
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}


def make_checkpoint(directory: Path, blocks: int, vocabulary: int) -> None:
    """Write a random GPTQ checkpoint of so many blocks."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "quantization_config": gptq.quantization_config(bits=4, group_size=GROUP_SIZE, skipped=[]),
    }
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    specs = [TensorSpec("model.embed_tokens.weight", torch.float16, (vocabulary, HIDDEN))]
    for block in range(blocks):
        path = f"model.layers.{block}"
        for linear, (k, n) in LINEARS.items():
            for suffix, (dtype, shape) in gptq.tensors(k, n, bits=4, group_size=GROUP_SIZE).items():
                specs.append(TensorSpec(f"{path}.{linear}.{suffix}", dtype, shape))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs.append(TensorSpec(f"{path}.{norm}.weight", torch.float16, (HIDDEN,)))
    specs.append(TensorSpec("model.norm.weight", torch.float16, (HIDDEN,)))
    specs.append(TensorSpec("lm_head.weight", torch.float16, (vocabulary, HIDDEN)))
    shapes = {spec.name: spec for spec in specs}
    with ShardWriter(directory, specs, 10**9) as writer:
        for name in writer.order:
            writer.write(name, _random(shapes[name]))
        writer.close()


def _random(spec: TensorSpec) -> torch.Tensor:
    suffix = spec.name.rpartition(".")[2]
    if suffix == "qweight":
        return torch.randint(-(2**31), 2**31, spec.shape, dtype=torch.int32)
    if suffix == "qzeros":
        return torch.full(spec.shape, 0x77777777, dtype=torch.int32)
    if suffix == "g_idx":
        return torch.arange(spec.shape[0], dtype=torch.int32) // GROUP_SIZE
    return torch.rand(spec.shape, dtype=torch.float32).add_(0.5).mul_(0.01).to(spec.dtype)


def repack(source: Path, output: Path) -> None:
    """The whole command."""
    command = [sys.executable, "-m", "marlin_convert", "quantize", str(source), "-o", str(output), "-q"]
    subprocess.run([*command, "--format", "marlin", "--device", "cpu"], check=True)


def copy_twice(source: Path, output: Path) -> None:
    """Copy all files of a directory twice, one after the other, each hashed and fsynced."""
    for number in (1, 2):
        folder = output / str(number)
        folder.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            digest = hashlib.sha256()
            target = folder / path.name
            with path.open("rb", buffering=0) as original, target.open("wb", buffering=0) as copy:
                while chunk := original.read(1 << 20):
                    digest.update(chunk)
                    copy.write(chunk)
                os.fsync(copy.fileno())


def measured(run: Callable[[Path, Path], None], source: Path, output: Path) -> tuple[float, float]:
    """Seconds on the clock and of all processors, the children's included."""
    os.sync()
    wall, before = time.perf_counter(), os.times()
    run(source, output)
    wall, after = time.perf_counter() - wall, os.times()
    shutil.rmtree(output)
    return wall, sum(after[:4]) - sum(before[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=13)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--directory", help="Where there is room for three times the checkpoint.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        source, output = Path(temporary, "source"), Path(temporary, "output")
        source.mkdir()
        make_checkpoint(source, options.blocks, options.vocabulary)
        nbytes = sum(len(path.read_bytes()) for path in source.iterdir())
        threads = torch.get_num_threads()
        print(
            f"{nbytes / 1e9:.2f} GB, {options.blocks} blocks, {threads} threads, torch {torch.__version__}\n"
        )
        print("|  load | repack s (cpu) | copy twice s (cpu) | ratio (cpu) |")
        print("|-------|----------------|--------------------|-------------|")
        measured(copy_twice, source, output)  # else the first to run pays for memory that was never in use
        for _ in range(options.repeats):
            load = os.getloadavg()[0]
            ours, ours_cpu = measured(repack, source, output)
            copy, copy_cpu = measured(copy_twice, source, output)
            print(
                f"| {load:5.2f} | {ours:6.2f} ({ours_cpu:5.2f}) | {copy:10.2f} ({copy_cpu:5.2f}) "
                f"| {ours / copy:4.2f} ({ours_cpu / copy_cpu:4.2f}) |",
                flush=True,
            )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"\npeak memory of the repack {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
