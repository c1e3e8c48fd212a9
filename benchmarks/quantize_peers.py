"""Quality, seconds and peak memory of W4 quantization, ours and the peers in one run.

usage: python benchmarks/quantize_peers.py MODEL ENVIRONMENTS [--text FILE | --ids FILE.safetensors:NAME]
           [--samples 128] [--length 1024] [--group-size 128] [--device cpu] [--threads 2]
           [--runs ours,ours:fast,llmc:default,llmc:best,gptqm:default,gptqm:best,gptqm:gptaq,gptqm:foem]

ENVIRONMENTS is a directory with what `benchmarks/peers/environments.sh llmc|gptqm|autoround` made. Further
runs are ours:high, and autoround:default and autoround:best, which take hours on a CPU. Everybody gets the
same token ids, the builtin calibration text, and as many threads; ours:high tunes on more of that text.
Quality is measured on 64 x 1024 tokens of --text (default: the builtin text that calibration leaves out), or
on --ids, with one evaluation for all, in float32. Seconds and memory are of whole processes; a GPU's
memory is what is in use of the whole device beyond what was before, looked at twenty times a second.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
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


def processor() -> str:
    """The processor and the flags that decide how fast it multiplies 16-bit numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    return f"{facts.get('model name', platform.processor())}: {' '.join(flags)}"


def gpu_free(device: str) -> float:
    """MB of the GPU that nobody has; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**20 if device == "cuda" else 0.0


def run(command: list[str], chosen: argparse.Namespace) -> dict[str, float]:
    """Run a command to its end; its seconds and CPU seconds, peak MB and peak MB of the GPU."""
    environment = os.environ | {
        name: str(chosen.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    least = before = gpu_free(chosen.device)
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            least = min(least, gpu_free(chosen.device))
            time.sleep(0.05)
        wall = time.perf_counter() - started
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-4000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": wall, "cpu": cpu, "rss": usage.ru_maxrss / 1024, "gpu": before - least}


def command_of(name: str, chosen: argparse.Namespace, tokens: Path, output: Path) -> list[str]:
    """The command line of a run."""
    who, _, setting = name.partition(":")
    if who == "ours":
        return [
            sys.executable, "-m", "marlin_convert", "quantize", str(chosen.model), "-o", str(output),
            "--device", chosen.device, "--samples", str(chosen.samples),
            "--sequence-length", str(chosen.length), "--group-size", str(chosen.group_size),
            "--effort", setting or "default",
        ]  # fmt: skip
    return [
        str(chosen.environments / who / "bin" / "python"), str(HERE / "peers" / RUNNERS[who]),
        str(chosen.model), str(tokens), str(output), "--setting", setting,
        "--group-size", str(chosen.group_size), "--device", chosen.device, "--threads", str(chosen.threads),
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", default=RUNS)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    calibration = calibrate(tokenizer, "builtin", samples=chosen.samples, length=chosen.length, seed=0)
    ids = held_out(chosen, Source(chosen.model, chosen.model.name, None))
    machine = torch.cuda.get_device_name(device) if chosen.device == "cuda" else processor()
    print(f"{machine}\ntorch {torch.__version__}, {chosen.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'run':18} {'ppl':>8} {'KL':>8} {'top-1':>7} {'s':>7} {'CPU s':>8} {'peak MB':>8} {'GPU MB':>7}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "tokens.safetensors"
        save_file({"input_ids": calibration.ids}, tokens)
        rows = {}
        for name in chosen.runs.split(","):
            output = Path(temporary) / name.replace(":", "-")
            cost = run(command_of(name, chosen, tokens, output), chosen)
            found = judged(chosen.model, output, ids, device)
            if not rows:
                print(f"{'original':18} {found.source_perplexity:8.4f}")
            rows[name] = {"ppl": found.perplexity, "kl": found.divergence, "top1": found.agreement, **cost}
            print(
                f"{name:18} {found.perplexity:8.4f} {found.divergence:8.5f} {found.agreement:7.4f} "
                f"{cost['wall']:7.1f} {cost['cpu']:8.1f} {cost['rss']:8.0f} {cost['gpu']:7.0f}",
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
