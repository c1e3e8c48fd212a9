"""Tokens that vLLM gives of one checkpoint by one GPU and by several (tensor parallel), side by side.

    python benchmarks/vllm_ranks.py CHECKPOINT --ranks 1,2,4

Greedy, from pieces of the builtin text; an engine in processes of its own for each number of GPUs. Sums in
another order may turn a near tie: where a run chose another token first, the table has how far that one was
behind in the first run, at most (inf: not among its five likeliest), and how far log-probabilities are apart
until there.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

PROMPT, TOKENS, PROMPTS = 64, 128, 32


def generate(checkpoint: str, ranks: int, out: Path) -> None:
    """Write the tokens of every answer, the log-probabilities of the likeliest, and seconds a step."""
    from vllm import LLM, SamplingParams

    from marlin_convert import builtin_text

    # a custom sum over NVLink is one more thing that may differ: NCCL's is vLLM's own fallback
    engine = LLM(checkpoint, dtype="float16", max_model_len=1024, tensor_parallel_size=ranks,
                 gpu_memory_utilization=0.5, disable_custom_all_reduce=True)  # fmt: skip
    tokenizer = engine.get_tokenizer()
    pieces = itertools.islice(builtin_text.pieces(), PROMPTS)
    prompts = [{"prompt_token_ids": tokenizer(piece)["input_ids"][:PROMPT]} for piece in pieces]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True)
    engine.generate(prompts, greedy, use_tqdm=False)
    begin = time.perf_counter()
    answers = engine.generate(prompts, greedy, use_tqdm=False)
    seconds = (time.perf_counter() - begin) / TOKENS
    rows = []
    for [chosen] in (answer.outputs for answer in answers):
        likely = [{str(name): one.logprob for name, one in at.items()} for at in chosen.logprobs]
        rows.append({"tokens": [str(name) for name in chosen.token_ids], "likely": likely})
    out.write_text(json.dumps({"rows": rows, "seconds": seconds}))


def compared(first: dict[str, Any], other: dict[str, Any]) -> str:
    """The cells of a row, beside the first run."""
    same, equal, ties, apart = 0, 0, [], 0.0
    for a, b in zip(first["rows"], other["rows"], strict=True):
        places = zip(a["tokens"], b["tokens"], a["likely"], b["likely"], strict=True)
        for token, another, before, now in places:
            if token != another:
                ties.append(before[token] - before.get(another, -inf))
                break
            equal += 1
            apart = max(apart, abs(before[token] - now[token]))
        else:
            same += 1
    turned = f"{max(ties):.4f}" if ties else "none"
    step = f"{1e3 * other['seconds']:.2f}"
    return f"{same} of {PROMPTS} | {equal} of {PROMPTS * TOKENS} | {turned} | {apart:.4f} | {step}"


def main() -> None:
    """Generate by each number of ranks in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.out:
        generate(chosen.checkpoint, int(chosen.ranks), chosen.out)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| GPUs | answers equal | tokens equal until the first that is not | widest tie turned | "
          "log-probabilities differ by | ms a step |\n|---|---|---|---|---|---|", flush=True)  # fmt: skip
    first = None
    with TemporaryDirectory() as work:
        for ranks in chosen.ranks.split(","):
            out = Path(work) / f"{ranks}.json"
            words = [sys.executable, __file__, chosen.checkpoint, "--ranks", ranks, "--out", str(out)]
            subprocess.run(words, check=True)
            found = json.loads(out.read_text())
            first = first or found
            print(f"| {ranks} | {compared(first, found)} |", flush=True)


if __name__ == "__main__":
    main()
