"""What each effort of `quantize` leaves of a model: divergence from the original on text that it never saw.

usage: python benchmarks/quality.py MODEL [--text FILE | --ids FILE.safetensors:NAME] [--efforts fast,default]
           [--seeds 0,1] [--samples 512] [--length 1024] [--device cpu] [--set SETTING=VALUE]

A row is the mean over the seeds, which draw the calibration windows: KL(original || quantized) in nats a
token (in float32), perplexity, the share of tokens on which both find the same one likeliest, seconds of a
conversion. Without a text it is the part of the builtin one that calibration leaves out. A SETTING is one of
the recipe.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from marlin_convert.calibration import calibrate, load_tokenizer
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.divergence import Comparison, compare
from marlin_convert.commands import quantize as story
from marlin_convert.hub import Source
from marlin_convert.models.blocks import BlockModel
from marlin_convert.recipe import Recipe

SHOWN = ("divergence", "perplexity", "source_perplexity", "agreement")
FORMATTER = argparse.RawDescriptionHelpFormatter


def held_out(arguments: argparse.Namespace, source: Source) -> Tensor:
    """The token ids (samples, 1024) to judge on."""
    if arguments.ids:
        path, _, name = arguments.ids.rpartition(":")
        with safe_open(path, "pt") as file:
            return file.get_tensor(name).long()
    tokenizer = load_tokenizer(source, trust_remote_code=False)
    text = arguments.text or "builtin"
    return calibrate(tokenizer, text, samples=64, length=1024, seed=0, held_out=True).ids


def judged(source: Path, made: Path, ids: Tensor, device: torch.device) -> Comparison:
    """The quantized model beside its original, both in float32."""
    models = [
        BlockModel(Weights(Checkpoint.open(one)), device, dtype=torch.float32, fast=False)
        for one in (source, made)
    ]
    return compare(models[0], models[1], ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--ids")
    parser.add_argument("--efforts", default="fast,default")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SETTING=VALUE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{arguments.model.name}, {arguments.samples} x {arguments.length} tokens, {name}", flush=True)
    source = Source(arguments.model, arguments.model.name, None)
    ids = held_out(arguments, source)
    changes: dict[str, Any] = {
        key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in arguments.settings)
    }
    print(f"{'effort':10} {'KL':>8} {'each seed':>20} {'perplexity':>11} {'source':>8} {'top-1':>7} {'s':>7}")
    for effort in arguments.efforts.split(","):
        found, seconds = [], 0.0
        for seed in map(int, arguments.seeds.split(",")):
            recipe = Recipe(
                samples=arguments.samples, sequence_length=arguments.length, seed=seed, effort=effort
            ).changed(changes)
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                story.quantize(story.Job(source, Path(folder, "made"), recipe, device))
                seconds += time.perf_counter() - started
                found.append(judged(arguments.model, Path(folder, "made"), ids, device))
        mean = {name: sum(getattr(one, name) for one in found) / len(found) for name in SHOWN}
        each = " ".join(f"{one.divergence:.4f}" for one in found)
        print(
            f"{effort:10} {mean['divergence']:8.4f} {each:>20} {mean['perplexity']:11.4f} "
            f"{mean['source_perplexity']:8.4f} {mean['agreement']:7.4f} {seconds / len(found):7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
