"""Seconds per layer of one conversion that torchrun shares among GPUs, beside those of one process.

usage: python benchmarks/quantize_ranks.py [--ranks 1,2] [--shapes 8b,qwen3-30b] [--layers 6] [--parts 2]
       python benchmarks/quantize_ranks.py --shapes 8b --layers 2 --effort high

Every conversion is a process for each rank, 256 x 2048 tokens. What a layer costs is the median over all but
the first, in which kernels are compiled (of one layer that one is given), beside the quickest, the slowest
and the whole conversion. Codes are compared with those of the first number of ranks. For the `--parts`
numbers of ranks the model is converted once more, with every part of the work timed at every rank, and the
bytes of both conversions are compared. Models are made on the first GPU, 0.44 and 1.3 GB a layer, in a
directory inside of `--directory` that is removed at the end. `--shapes tiny` is for a CPU, `deepseek-v3`
(64 x 2048 tokens) has 23 GB a layer. `--tokens` tries micro-batches of other sizes than ours. With
`--effort high` the text of the calibration alone is tuned on, and a step's median is in place of a layer's.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import parts
import quantize_gpu
import quantize_mixture
import torch
from safetensors import safe_open

from marlin_convert import recipe, student
from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.cli import torchrun
from marlin_convert.hub import Source
from marlin_convert.models import hidden
from marlin_convert.options import pick_device

HERE = Path(__file__).resolve().parent


def make_model(shape: str, directory: Path, layers: int) -> Path:
    """A random model of so many layers."""
    if shape == "8b":
        return quantize_gpu.make_model(directory, layers)
    return quantize_mixture.make_model(shape, directory, layers)


def tokens(shape: str) -> tuple[int, int]:
    """Samples, and tokens of each."""
    return (256, 2048) if shape == "8b" else quantize_mixture.SHAPES[shape][3:]


def run(ranks: int, *words: object) -> str:
    """What so many processes print that run Python with these words."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return subprocess.run(
        [sys.executable, *torchrun, *map(str, words)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=HERE.parent,
        # torchrun lets every process have one thread where nobody says otherwise
        env={"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))} | os.environ,
    ).stdout  # fmt: skip


def hashes(output: Path) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file of weights, by the manifest that was written beside them."""
    files = json.loads((output / MANIFEST).read_text())["files"]
    return [(name, one["sha256"]) for name, one in files.items() if name.endswith(".safetensors")]


def same_codes(one: Path, other: Path) -> float:
    """Share of the 4-bit codes of two checkpoints in `compressed-tensors` that are alike."""
    alike = total = 0
    for file in one.glob("*.safetensors"):
        with safe_open(file, "pt") as ours, safe_open(other / file.name, "pt") as theirs:
            for name in ours.keys():  # noqa: SIM118 - a file is no dict
                if name.endswith(".weight_packed"):
                    bits = (ours.get_tensor(name) ^ theirs.get_tensor(name)).view(torch.uint8)
                    alike += int(((bits & 15) == 0).sum() + (bits < 16).sum())
                    total += 2 * bits.numel()
    return alike / total


def steps_timed(device: torch.device) -> list[float]:
    """Where the seconds of every step of the tuning will be."""
    learn, taken = student.Student.learn, list[float]()

    def timed(model: student.Student, ids: torch.Tensor, step: int, rate: float) -> None:
        started = time.perf_counter()
        learn(model, ids, step, rate)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)

    student.Student.learn = timed  # type: ignore[method-assign]
    return taken


def one_of_ranks(
    shape: str, model: Path, output: Path, *, effort: str, in_parts: bool, micro_batch: int
) -> None:
    """Be one of the processes of a conversion; the first prints a table of the parts, or JSON."""
    samples, length = tokens(shape)
    settings = {
        "samples": samples, "sequence_length": length, "format": "compressed-tensors", "effort": effort,
    }  # fmt: skip
    chosen = recipe.load(recipe.DEFAULT).changed(settings)
    with torchrun.ranks() as ranks:
        device = pick_device(torchrun.device("auto"))
        if micro_batch:
            hidden.TOKENS[device.type] = micro_batch
        parts.story.TOKENS = 0  # to tune on beyond the calibration's
        job = parts.story.Job(Source(model, model.name, None), output, chosen, device, ranks=ranks)
        if in_parts:
            found = ranks.all_say(parts.convert(job))
            if ranks.first:
                print(parts.table_of_ranks(found))
            return
        steps = steps_timed(device)
        started = time.perf_counter()
        layers = parts.seconds(job)
        whole = time.perf_counter() - started
        of_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        memory = ranks.all_say((of_gpu, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        if ranks.first:
            print(json.dumps({"layers": steps or layers, "whole": whole, "memory": memory}))


def main() -> None:
    """Print a line for every conversion, and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--shapes", default="8b,qwen3-30b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--directory", type=Path, help="where models and checkpoints are put for the while")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--parts", default="", help="numbers of ranks")
    parser.add_argument("--tokens", type=int, default=0, help="of a micro-batch")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one_of_ranks(
            chosen.shapes, *chosen.one,
            effort=chosen.effort, in_parts=bool(chosen.parts), micro_batch=chosen.tokens,
        )  # fmt: skip
        return
    counts = [int(count) for count in chosen.ranks.split(",")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {chosen.layers} layers", flush=True)
    table = []
    for shape in chosen.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=chosen.directory) as temporary:
            here = Path(temporary)
            model = make_model(shape, here / "model", chosen.layers)
            medians: dict[int, float] = {}
            for ranks in counts:
                output = here / f"out-{ranks}"
                words = [__file__, "--shapes", shape, "--tokens", chosen.tokens, "--effort", chosen.effort]
                words += ["--one", model]
                found = json.loads(run(ranks, *words, output).splitlines()[-1])
                timed = sorted(found["layers"][1:] or found["layers"])
                medians[ranks] = median(timed)
                gpu, host = (max(of_all) / 1e9 for of_all in zip(*found["memory"], strict=True))
                codes = same_codes(output, here / f"out-{counts[0]}")
                table.append(
                    f"| {shape} | {ranks} | {medians[ranks]:.3f} | {timed[0]:.2f} to {timed[-1]:.2f} "
                    f"| {medians[counts[0]] / medians[ranks]:.2f} | {found['whole']:.1f} | {codes:.4f} "
                    f"| {gpu:.1f} | {host:.1f} |"
                )
                print(table[-1], flush=True)
                if str(ranks) in chosen.parts.split(","):
                    said = run(ranks, *words, here / "again", "--parts", ranks)
                    print(f"parts, seconds a layer but the first, a column a rank:\n{said}", flush=True)
                    same = hashes(output) == hashes(here / "again")
                    print(
                        "bytes of both conversions: " + ("the same" if same else "NOT the same"), flush=True
                    )
                    shutil.rmtree(here / "again")
    what = "step" if chosen.effort == "high" else "layer"
    print(
        f"\n| shape | ranks | seconds a {what} | from, to | times as fast as {counts[0]} | whole "
        "| same codes | GPU, GB | host, GB |\n" + "|---" * 9 + "|"
    )
    print("\n".join(table))


if __name__ == "__main__":
    main()
