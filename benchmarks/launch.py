"""Microseconds of the host that a product takes to launch, beside torch.matmul, one token at a time.

    python benchmarks/launch.py

A hundred launches, then a synchronization, of all in turn: a host's clock changes from one second to the
next. Medians of forty-five such rounds, of the microseconds and of what part of torch.matmul's they are.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from marlin_convert.kernels.matmul import MarlinLinear, matmul

LAUNCHES = 100
ROUNDS = 45


def host(call: Callable[[], object]) -> float:
    """Microseconds a call, in one round."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    return (time.perf_counter() - begin) / LAUNCHES * 1e6


def main() -> None:
    """Print microseconds, and what part of torch.matmul's they are."""
    k = n = 4096
    B = torch.randint(-(2**31), 2**31 - 1, (k // 16, 2 * n), dtype=torch.int32, device="cuda")
    s = torch.rand(k // 128, n, dtype=torch.half, device="cuda")
    x = torch.randn(1, k, dtype=torch.half, device="cuda")
    weight = torch.randn(n, k, dtype=torch.half, device="cuda")
    module, linear = MarlinLinear(B, s), torch.nn.Linear(k, n, False, "cuda", torch.half)
    operator = torch.ops.marlin_convert.matmul.default
    calls = {
        "torch.matmul": lambda: torch.matmul(x, weight.t()),
        "matmul": lambda: matmul(x, B, s),
        "the operator": lambda: operator(x, B, s),
        "nn.Linear": lambda: linear(x),
        "MarlinLinear": lambda: module(x),
    }
    with torch.inference_mode():
        rounds = [{name: host(call) for name, call in calls.items()} for _ in range(1 + ROUNDS)][1:]
    for name in calls:
        share = median(one[name] / one["torch.matmul"] for one in rounds)
        print(f"{name:14}{median(one[name] for one in rounds):7.2f} us  {share:.2f}")


if __name__ == "__main__":
    main()
