"""Our client beside `vllm bench serve`: the same load on one server, in turns.

    python benchmarks/serve_client.py PYTHON MODEL [--url URL] [--rounds 5] [--num-prompts 40] ...

PYTHON is that of an environment with vLLM (benchmarks/peers/environments.sh vllm DIR), which serves MODEL, a
directory, on a free port; with --url a server that runs already is asked for MODEL. On a machine where other
work takes the processors, tests/stub_server.py is the server whose times depend on them least.

Every round runs both clients, with a seed of its own so that no prompt is in the server's cache; printed are
the medians over the rounds, and ours divided by vLLM's. The first round is thrown away: it warms the server.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

# The model is on this machine, and one gigabyte of keys and values is plenty.
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
KEYS = (
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for kind in ("mean", "median", "p99")),
    *("request_throughput", "output_throughput", "total_input_tokens", "total_output_tokens"),
)


@contextmanager
def served(vllm: Path, model: Path, log: Path) -> Iterator[str]:
    """The address of a vLLM server of a model, which is stopped in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **SETTINGS}
        )
    try:
        while not answers(f"{address}/health"):
            if server.poll() is not None:
                sys.exit(f"vLLM does not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def answers(address: str) -> bool:
    """Whether there is a 200 at an address."""
    try:
        with urlopen(address) as answer:
            return answer.status == 200
    except URLError:
        return False


def ours(address: str, load: list[str], options: argparse.Namespace, seed: int) -> dict[str, float]:
    """What our client measures."""
    command = [sys.executable, "-m", "marlin_convert", "bench", "serve", "--url", address, "--json", "-q"]
    command += ["--model", str(options.model), "--num-warmups", "1", "--seed", str(seed), *load]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def vllms(
    vllm: Path, address: str, load: list[str], options: argparse.Namespace, seed: int, out: Path
) -> dict[str, float]:
    """What vLLM's client measures; it sends one request before by itself."""
    command = [vllm, "bench", "serve", "--backend", "openai", "--base-url", address, "--model", options.model]
    command += ["--dataset-name", "random", "--ignore-eos", "--temperature", "0", "--seed", str(seed), *load]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--result-filename", out]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **SETTINGS}, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"vLLM's client failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(out.read_text())


def main() -> None:
    """Print a table: medians over the rounds of ours and of vLLM's, and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("python", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-prompts", default="40")
    parser.add_argument("--request-rate", default="4")
    parser.add_argument(
        "--max-concurrency", help="1 with --request-rate inf: what arrives when plays no part"
    )
    parser.add_argument("--input-len", default="128")
    parser.add_argument("--output-len", default="32")
    options = parser.parse_args()
    vllm = options.python.absolute().parent / "vllm"
    load = [
        *("--num-prompts", options.num_prompts, "--request-rate", options.request_rate),
        *("--input-len", options.input_len, "--output-len", options.output_len),
    ]
    if options.max_concurrency:
        load += ["--max-concurrency", options.max_concurrency]
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "vLLM's": []}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        server = nullcontext(options.url) if options.url else served(vllm, options.model, directory / "log")
        with server as address:
            for number in range(options.rounds + 1):
                seed = 2 * number
                rounds["ours"].append(ours(address, load, options, seed))
                rounds["vLLM's"].append(
                    vllms(vllm, address, load, options, seed + 1, directory / f"{number}.json")
                )
                print(f"round {number} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(f"{' '.join(load)}, {options.rounds} rounds\n")
    print("|                       |     ours |   vLLM's | ratio |")
    print("|-----------------------|----------|----------|-------|")
    for key in KEYS:
        one, other = (statistics.median(found[key] for found in measured[1:]) for measured in rounds.values())
        print(f"| {key:21} | {one:8.2f} | {other:8.2f} | {one / other:5.3f} |")


if __name__ == "__main__":
    main()
