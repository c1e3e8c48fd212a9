"""A decode step in vLLM: how long the GPU is busy with it, and the clock, of several checkpoints in turn.

    python benchmarks/vllm_decode.py WORK fp16=DIR gptq=DIR gptq-marlin=DIR,linear_backend=marlin marlin=DIR
    python benchmarks/vllm_decode.py WORK marlin=DIR early=DIR,TORCHINDUCTOR_ENABLE_PDL=1

The checkpoints are of one model, the first of them is what the others are compared with; settings of vLLM's
LLM may follow a directory, and variables of the environment in capitals. 64 random tokens in; CUDA graphs
and torch.compile as vLLM has them, an engine in a process of its own for each. Busy is what the kernels of 32
steps take together, overlaps counted once, by torch's profiler: of 41 tokens less those of 9. The clock is 65
tokens less one, the second best of four. Equal digests of answers are equal answers.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BATCHES = (1, 16, 64)
PROMPT = 64


def busy(profile: Any) -> tuple[float, Counter[str]]:
    """Microseconds in which a GPU had a kernel to run, and those of every kernel."""
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    until = total = 0.0
    kernels: Counter[str] = Counter()
    for begin, end, name in events:
        alone = max(0.0, end - max(until, begin))
        until = max(until, end)
        total += alone
        kernels[name] += alone
    return total, kernels


def profiled(run: Callable[[int], object], tokens: int) -> tuple[float, Counter[str]]:
    """`busy` of a run that gives so many tokens."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(tokens)
        torch.cuda.synchronize()
    return busy(profile)


def seconds(run: Callable[[int], object], tokens: int) -> float:
    """The second best of four runs."""
    taken = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(tokens)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[1]


def measure(name: str, directory: str, settings: dict[str, str], out: Path) -> None:
    """Measure one checkpoint in this process, and write the rows to a file."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        directory, max_model_len=1024, enable_prefix_caching=False, gpu_memory_utilization=0.6,
        max_num_seqs=max(BATCHES), **settings,
    )  # fmt: skip
    rows = []
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(5, 4000, (batch, PROMPT), generator=generator).tolist()
        prompts = [{"prompt_token_ids": one} for one in ids]

        def run(tokens: int, prompts: list[dict[str, list[int]]] = prompts) -> Any:
            greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            return engine.generate(prompts, greedy, use_tqdm=False)

        run(8)
        answers = [list(one.outputs[0].token_ids) for one in run(64)]
        clock = (seconds(run, 65) - seconds(run, 1)) / 64
        (short, few), (long, many) = (profiled(run, tokens) for tokens in (9, 41))
        many.subtract(few)
        largest = [(kernel[:60], round(us / 32, 1)) for kernel, us in many.most_common(6)]
        digest = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:8]
        row = {
            "batch": batch, "busy_us": (long - short) / 32, "clock_us": clock * 1e6, "largest": largest,
            "answers": digest,
        }  # fmt: skip
        rows.append(row)
        times = f"busy {row['busy_us']:.0f} us, clock {row['clock_us']:.0f}"
        print(f"{name}, batch {batch}: {times}, answers {digest}", flush=True)
    out.write_text(json.dumps(rows, indent=1))
    os._exit(0)  # there is nothing left to tidy up, and vLLM may fail to


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Microseconds a step and how many times as fast as the first."""
    lines = [
        "| batch | | busy, us | times as fast | clock, us | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(found.values()))
    for place, batch in enumerate(BATCHES):
        for name, rows in found.items():
            row, base = rows[place], first[place]
            busy_us, clock_us = row["busy_us"], row["clock_us"]
            lines.append(
                f"| {batch} | {name} | {busy_us:.0f} | {base['busy_us'] / busy_us:.2f} "
                f"| {clock_us:.0f} | {base['clock_us'] / clock_us:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure every checkpoint in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="where results are written")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR[,SETTING=VALUE]")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for checkpoint in chosen.checkpoints:
        name, _, rest = checkpoint.partition("=")
        directory, *settings = rest.split(",")
        said = dict(one.split("=", 1) for one in settings)
        out = chosen.work / f"{name}.json"
        if chosen.here:
            measure(name, directory, {key: value for key, value in said.items() if not key.isupper()}, out)
        # the profiler sees the kernels of its own process only
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment |= {key: value for key, value in said.items() if key.isupper()}
        words = [sys.executable, __file__, str(chosen.work), checkpoint, "--here"]
        subprocess.run(words, env=environment, check=True)
        found[name] = json.loads(out.read_text())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{table(found)}")


if __name__ == "__main__":
    main()
