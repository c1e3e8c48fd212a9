"""Seconds per layer of a random mixture of experts, with every part accounted for, and the memory it takes.

usage: python benchmarks/quantize_mixture.py [--shape qwen3-30b] [--layers 2,4] [--directory /dev/shm]

Conversions are timed as processes of their own at two layer counts; their slope is what a layer costs. The
last one is run once more with every part of the work timed. Shapes: `qwen3-30b` (Qwen3-30B-A3B, 48 layers of
128 experts), `deepseek-v3` (a layer of 256 experts of 7168 x 2048; one alone is timed whole), `tiny` for a
CPU. Models are made on the device, in bfloat16 and with a small vocabulary, in a directory inside of
`--directory` that is removed at the end: 1.3 and 23 GB a layer.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import parts
import torch

from marlin_convert import recipe
from marlin_convert.commands.quantize import Job, plan_job, quantize
from marlin_convert.estimate import estimate
from marlin_convert.hub import Source

HERE = Path(__file__).resolve().parent
TINYPY = HERE.parent / "examples" / "tinypy-4m"
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

# model type, config, layers of the real model, samples and tokens of each
SHAPES: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "tiny": (
        "qwen3_moe",
        {
            "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 16,
            "num_experts_per_tok": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        },
        4, 16, 256,
    ),
    "qwen3-30b": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        },
        48, 256, 2048,
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
            "topk_group": 4, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "first_k_dense_replace": 0,
        },
        58, 64, 2048,
    ),
}  # fmt: skip


def make_model(shape: str, directory: Path, layers: int) -> Path:
    """A random model of so many layers."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    model_type, settings, *_ = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(TINYPY)
    config = CONFIG_MAPPING[model_type](
        **settings, num_hidden_layers=layers, vocab_size=len(tokenizer), max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return directory


def job_of(shape: str, model: Path, output: Path) -> Job:
    """The conversion that is timed."""
    samples, length = SHAPES[shape][3:]
    settings = {"samples": samples, "sequence_length": length, "format": "compressed-tensors"}
    return Job(Source(model, model.name, None), output, recipe.load(recipe.DEFAULT).changed(settings), DEVICE)


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def one_conversion(job: Job, *, timed: bool) -> dict[str, Any]:
    """What is printed by the process of one conversion."""
    held = []
    found: dict[str, Any] = {}
    started = time.perf_counter()
    if timed:
        found["parts"], found["wall"] = parts.convert(job)
    else:

        def progress(numbers: range, total: int) -> Any:
            for number in numbers:
                yield number
                held.append(anonymous_memory())

        quantize(job, progress)
    found["seconds"] = time.perf_counter() - started
    found["host"] = held
    found["host_peak"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["gpu"] = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    found["gpu_reserved"] = torch.cuda.max_memory_reserved() if DEVICE.type == "cuda" else 0
    return found


def in_a_process(shape: str, model: Path, output: Path, *, timed: bool = False) -> dict[str, Any]:
    """Run `one_conversion` in a process of its own; with the seconds that it took from start to end."""
    started = time.perf_counter()
    words = [sys.executable, __file__, "--shape", shape, "--one", str(model), str(output)]
    done = subprocess.run(words + ["--timed"] * timed, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"command": time.perf_counter() - started}


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f}"


def main() -> None:
    """Print a table, or be the process of one conversion."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b", choices=SHAPES)
    parser.add_argument("--layers", help="two counts; of deepseek-v3 one, 1")
    parser.add_argument("--directory", type=Path, help="where models and checkpoints are put for the while")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    shape = chosen.shape
    if chosen.one:
        print(json.dumps(one_conversion(job_of(shape, *chosen.one), timed=chosen.timed)))
        return
    counts = [int(n) for n in (chosen.layers or ("1" if shape == "deepseek-v3" else "2,4")).split(",")]
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    samples, length = SHAPES[shape][3:]
    print(f"{shape}, {samples} x {length} tokens, {name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=chosen.directory) as temporary:
        here, commands = Path(temporary), {}
        for count in counts:
            started = time.perf_counter()
            model = make_model(shape, here / f"model-{count}", count)
            made = time.perf_counter() - started
            plan = plan_job(job_of(shape, model, here / "none"))[1]
            expected = estimate(plan, DEVICE)
            run = in_a_process(shape, model, here / f"out-{count}")
            commands[count] = run["command"]
            print(
                f"{count} layers: {run['command']:.1f} s, work {run['seconds']:.1f} (made in {made:.1f})"
                f"\n  the plan said {expected.seconds:.0f} s and {gib(expected.memory)} GiB"
                f"\n  GPU peak {gib(run['gpu'])} GiB, reserved {gib(run['gpu_reserved'])}; "
                f"host peak {gib(run['host_peak'])}, after each layer without mapped files "
                f"{' '.join(gib(one) for one in run['host'])}",
                flush=True,
            )
        low, high = min(counts), max(counts)
        if low < high:
            slope = (commands[high] - commands[low]) / (high - low)
            whole = commands[low] + slope * (SHAPES[shape][2] - low)
            print(f"{slope:.2f} s per layer; {whole:.0f} s for {SHAPES[shape][2]} layers")
        if high > 1:
            run = in_a_process(shape, here / f"model-{high}", here / "parts", timed=True)
            print("parts, seconds per layer but the first; the device is waited for around each")
            print(parts.table([tuple(one) for one in run["parts"]], run["wall"]))


if __name__ == "__main__":
    main()
