"""The kernel beside cuBLAS float16 and, where they can be imported, vLLM's Marlin and Machete and Humming.

    python benchmarks/kernel.py OUT.json [--shapes 8B.o,8B.qkv] [--batches 1,16,64]

Every cell is a CUDA graph over as many copies of the weights as the L2 cannot hold; median of timed replays.
All run in one process, one after the other on the same shape; a ratio is a speed-up over cuBLAS in this run.
VLLM_C names vLLM's _C_stable_libtorch.abi3.so, out of its wheel; Humming's wheel is unpacked on PYTHONPATH.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from marlin_convert.kernels.matmul import matmul

SHAPES = {
    "8B.qkv": (4096, 6144),
    "8B.o": (4096, 4096),
    "8B.gate_up": (4096, 28672),
    "8B.down": (14336, 4096),
    "70B.qkv": (8192, 10240),
    "70B.o": (8192, 8192),
    "70B.gate_up": (8192, 57344),
    "70B.down": (28672, 8192),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 128
COLD = 400e6  # bytes of weights, so that none is in the L2 when its turn comes
U4B8 = 1125899907892224  # what vLLM calls unsigned 4 bits less 8

Multiply = Callable[[Tensor, Tensor, int], object]


def timed(calls: list[Callable[[], object]]) -> float:
    """Microseconds a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    replay()
    repeats = max(3, min(25, int(12 / max(replay(), 1e-3))))
    return statistics.median(replay() for _ in range(repeats)) * 1e3 / len(calls)


def peers(words: list[Tensor], scales: list[Tensor], k: int, n: int) -> dict[str, Multiply]:
    """What can be imported of the others, on GPTQ words (k / 8, n) and scales (groups, n)."""
    found: dict[str, Multiply] = {}
    if os.environ.get("VLLM_C"):
        torch.ops.load_library(os.environ["VLLM_C"])
        c, empty = torch.ops._C, torch.empty(0, dtype=torch.int32, device="cuda")
        order = torch.arange(n, device="cuda")
        order = 64 * (order // 64) + order % 64 // 8 + 8 * (order % 8)
        marlin = [c.gptq_marlin_repack(word, empty, k, n, 4, False) for word in words]
        permuted = [scale[:, order].contiguous() for scale in scales]
        locks = torch.zeros(4096, dtype=torch.int32, device="cuda")
        none = [None] * 5
        found["marlin"] = lambda x, y, i: c.marlin_gemm(
            x, None, marlin[i], None, permuted[i], *none, locks, U4B8, len(x), n, k, True, False, True, False
        )
        machete = [c.machete_prepack_B(w.t().contiguous().t(), torch.half, U4B8, torch.half) for w in words]
        found["machete"] = lambda x, y, i: c.machete_mm(
            x, machete[i], U4B8, torch.half, scales[i], None, GROUP, None, None, None
        )
    try:
        import humming.layer
        from humming.forward import humming_forward
    except ImportError:
        return found
    config = {"dtype": "int4", "group_size": GROUP}
    layer = humming.layer.HummingLayer(
        shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16
    ).cuda()
    layer.load_from_unquantized(torch.randn(n, k, dtype=torch.half, device="cuda") * 0.02)
    layer.transform()
    weights = [layer.weight.data.clone() for _ in words]
    their_scales = [layer.weight_scale.data.clone() for _ in words]
    found["humming"] = lambda x, y, i: humming_forward(
        layer.humming_config,
        inputs=x,
        weight=weights[i],
        weight_scale=their_scales[i],
        outputs=y,
        locks=layer.locks,
    )
    return found


def measure(k: int, n: int, batches: list[int]) -> dict[int, dict[str, float]]:
    """Microseconds by batch size and kernel."""
    copies = max(2, math.ceil(COLD / (2 * k * n)))
    dense = [torch.randn(n, k, dtype=torch.half, device="cuda") * 0.02 for _ in range(copies)]
    copies = min(48, max(2, math.ceil(COLD / (k * n / 2))))
    # any words are codes: what is in them does not matter to the time
    codes = [
        torch.randint(-(2**31), 2**31 - 1, (k // 16, 2 * n), dtype=torch.int32, device="cuda")
        for _ in range(copies)
    ]
    scales = [torch.rand(k // GROUP, n, dtype=torch.half, device="cuda") * 0.01 + 0.002 for _ in codes]
    others = peers([code.view(k // 8, n) for code in codes], scales, k, n)
    others["ours"] = lambda x, y, i: matmul(x, codes[i], scales[i])
    found: dict[int, dict[str, float]] = {}
    for m in batches:
        x = torch.randn(m, k, dtype=torch.half, device="cuda")
        y = torch.empty(m, n, dtype=torch.half, device="cuda")
        calls = {"cublas": [partial(torch.matmul, x, weight.t(), out=y) for weight in dense]}
        for name, multiply in others.items():
            calls[name] = [partial(multiply, x, y, i) for i in range(copies)]
        found[m] = {name: timed(one) for name, one in calls.items()}
    return found


def main() -> None:
    """Measure, print, and write everything to OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    chosen = parser.parse_args()
    batches = [int(word) for word in chosen.batches.split(",")]
    rows = {}
    for name in chosen.shapes.split(","):
        rows[name] = measure(*SHAPES[name], batches)
        for m, cells in rows[name].items():
            ratios = " ".join(f"{who} {us:.1f} ({cells['cublas'] / us:.2f}x)" for who, us in cells.items())
            print(f"{name:12} {m:5}  {ratios}", flush=True)
        device = torch.cuda.get_device_name()
        chosen.out.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "us": rows}, indent=1)
        )
    print("geometric mean of the speed-ups over cuBLAS float16 (least, most)")
    for m in batches:
        line = []
        for who in next(iter(rows.values()))[m]:
            speedups = [cells[m]["cublas"] / cells[m][who] for cells in rows.values()]
            line.append(
                f"{who} {statistics.geometric_mean(speedups):.2f} ({min(speedups):.2f}-{max(speedups):.2f})"
            )
        print(f"{m:5}  {'  '.join(line)}")


if __name__ == "__main__":
    main()
