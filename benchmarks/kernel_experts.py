"""The kernels for experts beside vLLM's fused Marlin experts, one layer at a time.

    python benchmarks/kernel_experts.py OUT.json [--shapes qwen3-30b,deepseek-v3-tp8] [--tokens 1,16,64]

VLLM_C and VLLM_MOE_C name _C_stable_libtorch.abi3.so and _moe_C_stable_libtorch.abi3.so out of vLLM's wheel.
Everything that runs after the router is timed, in a CUDA graph that goes over copies of the weights which no
L2 holds; all tokens go to experts drawn at random. `floor` is the time that the bytes of the experts which
any token goes to take at the bandwidth that this GPU reads with.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from marlin_convert.kernels.experts import GroupedExperts, Stack

GROUP = 128
COLD = 400e6
# experts, hidden, inner, choices
SHAPES = {
    "qwen3-30b": (128, 2048, 768, 8),
    "deepseek-v3-tp8": (256, 7168, 256, 8),
    "mixtral-8x7b": (8, 4096, 14336, 2),
}
TOKENS = (1, 16, 64, 256, 1024)
UINT4B8 = 1125899907892224  # vLLM's number of the type
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Weights:
    """Random codes and scales of all experts, gate and up side by side as vLLM has them."""

    def __init__(self, count: int, hidden: int, inner: int):
        self.count, self.hidden, self.inner = count, hidden, inner
        self.B13, self.s13 = self._draw(hidden, 2 * inner)
        self.B2, self.s2 = self._draw(inner, hidden)

    def _draw(self, k: int, n: int) -> tuple[Tensor, Tensor]:
        B = torch.randint(-(2**31), 2**31 - 1, (self.count, k // 16, 2 * n), dtype=torch.int32, device="cuda")
        return B, torch.rand(self.count, k // GROUP, n, dtype=torch.half, device="cuda") * 0.3 * k**-0.5

    @property
    def nbytes(self) -> int:
        """Of codes and scales of one expert."""
        return sum(one.nbytes for one in (self.B13, self.s13, self.B2, self.s2)) // self.count


def ours(weights: Weights) -> Layer:
    """This project's."""
    B, s, inner = weights.B13, weights.s13, weights.inner
    gate, up = (Stack(B[..., 2 * a : 2 * b], s[..., a:b]) for a, b in ((0, inner), (inner, 2 * inner)))
    return GroupedExperts((gate, up), Stack(weights.B2, weights.s2))


def vllm(weights: Weights) -> Layer:
    """vLLM's, as its fused_marlin_moe calls its operators."""
    moe, others = torch.ops._moe_C, torch.ops._C
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(4 * processors, dtype=torch.int32, device="cuda")
    count, hidden, inner = weights.count, weights.hidden, weights.inner

    def product(x: Tensor, y: Tensor, B: Tensor, s: Tensor, order: tuple[Tensor, ...], shares: Tensor,
                block: int, choices: int, multiplies: bool) -> Tensor:  # fmt: skip
        return moe.moe_wna16_marlin_gemm(
            x, y, B, None, s, None, None, None, None, None, workspace, *order, shares, block, choices,
            multiplies, UINT4B8, len(x), s.shape[2], x.shape[1], True, False, True, False, -1, -1, -1,
        )  # fmt: skip

    def layer(x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        m, choices = index.shape
        block = next((b for b in (8, 16, 32, 48, 64) if m * choices / count / b < 0.9), 64)
        padded = index.numel() + count * (block - 1)
        if index.numel() < count:
            padded = min(index.numel() * block, padded)
        order = torch.empty(padded, dtype=torch.int32, device="cuda")
        experts = torch.empty(-(-padded // block), dtype=torch.int32, device="cuda")
        total = torch.empty(1, dtype=torch.int32, device="cuda")
        moe.moe_align_block_size(index, count, block, order, experts, total, None)
        found = (order, experts, total)
        both = x.new_empty(m * choices, 2 * inner)
        product(x, both, weights.B13, weights.s13, found, shares, block, choices, False)
        activated = x.new_empty(m * choices, inner)
        others.silu_and_mul(activated, both)
        answers = x.new_empty(m * choices, hidden)
        product(activated, answers, weights.B2, weights.s2, found, shares, block, 1, True)
        y = torch.empty_like(x)
        moe.moe_sum(answers.view(m, choices, hidden), y)
        return y

    return layer


def microseconds(run: Callable[[], object], calls: int) -> float:
    """Of one of `calls` calls that `run` makes: the median of twenty replays of a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return sorted(times)[10]


def in_turn(layers: list[Layer], x: Tensor, routes: list[tuple[Tensor, Tensor]]) -> None:
    """One copy of the layer after another."""
    for number, route in enumerate(routes):
        layers[number % len(layers)](x, *route)


def bandwidth() -> float:
    """Bytes a second that this GPU reads, in sums of two gigabytes."""
    data = torch.ones(2**29, device="cuda")
    return data.nbytes / microseconds(lambda: data.view(64, -1).sum(1), 1) * 1e6


def main() -> None:
    """Measure, print, and write everything to OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    asked = parser.parse_args()
    layers: dict[str, Callable[[Weights], Layer]] = {"ours": ours}
    if os.environ.get("VLLM_MOE_C"):
        torch.ops.load_library(os.environ["VLLM_C"])
        torch.ops.load_library(os.environ["VLLM_MOE_C"])
        layers["vllm"] = vllm
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {speed / 1e12:.2f} TB/s")
    found: dict[str, dict[str, dict[str, float]]] = {}
    torch.manual_seed(0)
    for name in asked.shapes.split(","):
        count, hidden, inner, choices = SHAPES[name]
        copies = [Weights(count, hidden, inner)]
        copies += [
            Weights(count, hidden, inner) for _ in range(max(1, math.ceil(COLD / (copies[0].nbytes * count))))
        ]
        for m in map(int, asked.tokens.split(",")):
            x = torch.randn(m, hidden, dtype=torch.half, device="cuda")
            # few experts are few bytes: other ones each time, so that they are not in L2
            times = 32 if m <= 256 else 8
            routes = []
            for _ in range(times):
                shares, index = torch.rand(m, count, device="cuda").softmax(-1).topk(choices)
                routes.append((index.int(), shares / shares.sum(-1, keepdim=True)))
            used = sum(len(index.unique()) for index, _ in routes) / times
            cell = {"floor": used * copies[0].nbytes / speed * 1e6}
            answers = {}
            for kind, make in layers.items():
                made = [make(one) for one in copies]
                answers[kind] = made[0](x, *routes[0]).double()

                cell[kind] = microseconds(partial(in_turn, made, x, routes), times)
            if "vllm" in answers:
                away = (answers["ours"] - answers["vllm"]).norm() / answers["vllm"].norm()
                assert away < 2e-3, f"{name} {m}: the answers differ by {away:.4f}"
            found.setdefault(name, {})[str(m)] = cell
            line = "  ".join(f"{kind} {us:8.1f}" for kind, us in cell.items())
            ratio = f"  vllm/ours {cell['vllm'] / cell['ours']:.2f}" if "vllm" in cell else ""
            print(
                f"{name:16} {m:5}  {line}{ratio}  floor/ours {cell['floor'] / cell['ours']:.2f}", flush=True
            )
        del copies
    if "vllm" in layers:
        for m in asked.tokens.split(","):
            ratios = [cells[m]["vllm"] / cells[m]["ours"] for cells in found.values()]
            mean = math.prod(ratios) ** (1 / len(ratios))
            print(f"{m:>5} tokens: {mean:.2f} times as fast as vLLM (geometric mean)")
    kept = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "us": found}
    asked.out.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
