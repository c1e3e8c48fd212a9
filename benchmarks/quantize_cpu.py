"""Quality, CPU seconds and peak memory of W4 quantization on a CPU, ours and the peers in one run.

usage: python benchmarks/quantize_cpu.py MODEL ENVIRONMENTS [--text FILE] [--ids FILE.safetensors:NAME]
           [--samples 128] [--length 1024] [--group-size 128]
           [--runs ours,ours:fast,llmc:default,llmc:best,gptqm:default,gptqm:best,gptqm:gptaq,gptqm:foem]

ENVIRONMENTS is a directory with what `benchmarks/peers/environments.sh llmc|gptqm|autoround` made; runs of
autoround:default and autoround:best take hours on a CPU. Everybody gets the same token ids, the builtin
calibration text, and two threads. Quality is measured on 64 x 1024 tokens of --text (default: the builtin
text that calibration leaves out), or on --ids, with one evaluation for all, in float32.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from quality import held_out, judged
from safetensors.torch import save_file
from transformers import AutoTokenizer

from marlin_convert.calibration import calibrate
from marlin_convert.hub import Source

HERE = Path(__file__).resolve().parent
FORMATTER = argparse.RawDescriptionHelpFormatter
RUNNERS = {"llmc": "llm_compressor.py", "gptqm": "gptqmodel_.py", "autoround": "auto_round_.py"}
RUNS = "ours,ours:fast,llmc:default,llmc:best,gptqm:default,gptqm:best,gptqm:gptaq,gptqm:foem"
THREADS = "2"


def processor() -> str:
    """The processor and the flags that decide how fast it multiplies 16-bit numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    return f"{facts.get('model name', platform.processor())}: {' '.join(flags)}"


def run(command: list[str]) -> dict[str, float]:
    """Run a command to its end; its CPU seconds and peak MB, as the operating system counted them."""
    environment = os.environ | {
        name: THREADS for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-4000:]}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss / 1024}


def command_of(name: str, chosen: argparse.Namespace, tokens: Path, output: Path) -> list[str]:
    """The command line of a run."""
    who, _, setting = name.partition(":")
    if who == "ours":
        return [
            sys.executable, "-m", "marlin_convert", "quantize", str(chosen.model), "-o", str(output),
            "--device", "cpu", "--samples", str(chosen.samples), "--sequence-length", str(chosen.length),
            "--group-size", str(chosen.group_size), "--effort", setting or "default",
        ]  # fmt: skip
    return [
        str(chosen.environments / who / "bin" / "python"), str(HERE / "peers" / RUNNERS[who]),
        str(chosen.model), str(tokens), str(output),
        "--setting", setting, "--group-size", str(chosen.group_size), "--threads", THREADS,
    ]  # fmt: skip


def main() -> None:
    """Print a row for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("model", type=Path)
    parser.add_argument("environments", type=Path)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--ids")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--runs", default=RUNS)
    chosen = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    calibration = calibrate(tokenizer, "builtin", samples=chosen.samples, length=chosen.length, seed=0)
    ids = held_out(chosen, Source(chosen.model, chosen.model.name, None))
    print(f"{processor()}\ntorch {torch.__version__}, {THREADS} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'run':16} {'ppl':>8} {'KL':>8} {'top-1':>7} {'CPU s':>8} {'peak MB':>8}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "tokens.safetensors"
        save_file({"input_ids": calibration.ids}, tokens)
        rows = {}
        for name in chosen.runs.split(","):
            output = Path(temporary) / name.replace(":", "-")
            command = command_of(name, chosen, tokens, output)
            cost = run(command)
            found = judged(chosen.model, output, ids, torch.device("cpu"))
            if not rows:
                print(f"{'original':16} {found.source_perplexity:8.4f}")
            rows[name] = {"ppl": found.perplexity, "kl": found.divergence, "top1": found.agreement, **cost}
            print(
                f"{name:16} {found.perplexity:8.4f} {found.divergence:8.5f} {found.agreement:7.4f} "
                f"{cost['cpu']:8.1f} {cost['rss']:8.0f}",
                flush=True,
            )
        peers = {name: row for name, row in rows.items() if not name.startswith("ours")}
        if "ours" in rows and peers:
            ours = rows["ours"]
            for figure, label in (
                ("kl", "KL, ours / best peer"),
                ("cpu", "CPU seconds, ours / fastest peer"),
            ):
                print(f"{label}: {ours[figure] / min(row[figure] for row in peers.values()):.3f}")
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
