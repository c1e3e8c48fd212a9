"""Seconds of loading checkpoints through transformers, beside reading the same bytes with safetensors.

usage: python benchmarks/load.py CHECKPOINT... [--output FILE.json] [--profile]

Both onto the GPU if there is one, the files in the page cache, by turns; medians.
"""

import argparse
import cProfile
import gc
import os
import pstats
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import marlin_convert  # noqa: F401  transformers knows our layouts by it
from marlin_convert.checkpoint.writer import write_json

CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"
REPEATS = 5

# transformers loads straight onto a GPU only where accelerate is installed.
PLACED = {"device_map": DEVICE} if find_spec("accelerate") else {}


def from_pretrained(directory: Path) -> nn.Module:
    """A checkpoint as its users load it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **PLACED).to(DEVICE)


def read(files: list[Path]) -> list[dict[str, Tensor]]:
    """All tensors of some files."""
    return [load_file(path, device=DEVICE) for path in files]


def seconds(call: Callable[[], object]) -> float:
    """Seconds a call takes that finds the GPU's memory empty."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    kept = call()
    if CUDA:
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    del kept
    return took


def measure(directory: Path) -> dict[str, Any]:
    """Bytes, and seconds both ways, a list of each."""
    files = sorted(directory.glob("*.safetensors"))
    for path in files:  # into the page cache
        with path.open("rb") as source, Path(os.devnull).open("wb") as nowhere:
            shutil.copyfileobj(source, nowhere, 1 << 24)
    calls = {"from_pretrained": partial(from_pretrained, directory), "load_file": partial(read, files)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {"bytes": sum(path.stat().st_size for path in files), "placed": bool(PLACED), **times}


def main() -> None:
    """Print a row for every checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", action="store_true", help="say where from_pretrained takes its time")
    chosen = parser.parse_args()
    disable_progress_bar()
    torch.zeros(1, device=DEVICE)  # the first use of a GPU takes seconds
    found = {}
    print(f"{'':16} {'GB':>6} {'from_pretrained':>20} {'load_file':>20} {'ratio':>6}")
    for directory in chosen.checkpoints:
        found[directory.name] = cell = measure(directory)
        ours, plain = (statistics.median(cell[name]) for name in ("from_pretrained", "load_file"))
        gb = cell["bytes"] / 1e9
        rates = " ".join(f"{s:7.3f} s {gb / s:5.2f} GB/s" for s in (ours, plain))
        print(f"{directory.name:16} {gb:6.2f} {rates} {ours / plain:6.3f}", flush=True)
        if chosen.output:
            write_json(chosen.output, found)
        if chosen.profile:
            profile = cProfile.Profile()
            profile.runcall(from_pretrained, directory)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(30)


if __name__ == "__main__":
    main()
