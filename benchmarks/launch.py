"""Microseconds of the host that a product takes to launch, beside torch.matmul, one token at a time.

    python benchmarks/launch.py

A hundred launches, then a synchronization; the median of fifteen such rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch

from marlin_convert.kernels.matmul import MarlinLinear, matmul

LAUNCHES = 100
ROUNDS = 15


def host(call: Callable[[], object]) -> float:
    """Microseconds a call."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        rounds.append((time.perf_counter() - begin) / LAUNCHES * 1e6)
    return statistics.median(rounds)


def main() -> None:
    """Print microseconds, and what part of torch.matmul's they are."""
    k = n = 4096
    B = torch.randint(-(2**31), 2**31 - 1, (k // 16, 2 * n), dtype=torch.int32, device="cuda")
    s = torch.rand(k // 128, n, dtype=torch.half, device="cuda")
    x = torch.randn(1, k, dtype=torch.half, device="cuda")
    weight = torch.randn(n, k, dtype=torch.half, device="cuda")
    module, linear = MarlinLinear(B, s), torch.nn.Linear(k, n, False, "cuda", torch.half)
    operator = torch.ops.marlin_convert.matmul.default
    with torch.inference_mode():
        yardstick = host(lambda: torch.matmul(x, weight.t()))
        for name, call in {
            "torch.matmul": lambda: torch.matmul(x, weight.t()),
            "matmul": lambda: matmul(x, B, s),
            "the operator": lambda: operator(x, B, s),
            "nn.Linear": lambda: linear(x),
            "MarlinLinear": lambda: module(x),
        }.items():
            us = host(call)
            print(f"{name:14}{us:7.2f} us  {us / yardstick:.2f}")


if __name__ == "__main__":
    main()
