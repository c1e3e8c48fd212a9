"""The kernels for experts beside vLLM's fused Marlin experts and Humming's, one layer at a time.

    python benchmarks/kernel_experts.py OUT.json [--shapes qwen3-30b,deepseek-v3-tp8] [--tokens 1,16,64]
           [--as 8.0]

VLLM_C and VLLM_MOE_C name _C_stable_libtorch.abi3.so and _moe_C_stable_libtorch.abi3.so out of vLLM's wheel;
Humming's wheel is unpacked on PYTHONPATH.
Everything that runs after the router is timed, in a CUDA graph that goes over copies of the weights which no
L2 holds; all tokens go to experts drawn at random. `floor` is the time that the bytes of the experts which
any token goes to take at the bandwidth that this GPU reads with. `--as` runs the kernels that a GPU of
another compute capability would be given.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton import language as tl

from marlin_convert.formats import marlin, words
from marlin_convert.formats.scheme import Scheme
from marlin_convert.kernels import experts as kernels
from marlin_convert.kernels.configurations import choose_for_experts
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


def in_blocks(index: Tensor, count: int, block: int) -> tuple[Tensor, ...]:
    """By vLLM's operator: choices in the order of the experts, padded to blocks, whose they are, how many."""
    padded = index.numel() + count * (block - 1)
    if index.numel() < count:
        padded = min(index.numel() * block, padded)
    order = torch.empty(padded, dtype=torch.int32, device="cuda")
    experts = torch.empty(-(-padded // block), dtype=torch.int32, device="cuda")
    total = torch.empty(1, dtype=torch.int32, device="cuda")
    torch.ops._moe_C.moe_align_block_size(index, count, block, order, experts, total, None)
    return order, experts, total


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
        found = in_blocks(index, count, block)
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


def humming(weights: Weights) -> Layer:
    """Humming's, as vLLM calls it: tokens indexed by vLLM's own operator, silu by Humming's."""
    from humming.forward import humming_forward, may_process_input
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    count, hidden, inner = weights.count, weights.hidden, weights.inner
    compute = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})
    layers, tuned = [], []
    for B, s in ((weights.B13, weights.s13), (weights.B2, weights.s2)):
        scheme = Scheme("marlin", 4, GROUP)
        experts = [marlin.unpack({"B": B[at], "s": s[at]}, scheme) for at in range(count)]
        layer = HummingLayer(
            shape_n=s.shape[2], shape_k=B.shape[1] * 16, num_experts=count,
            weight_config={"dtype": "int4", "group_size": GROUP}, torch_dtype=torch.float16,
        ).to(B.device)  # fmt: skip
        codes = torch.stack([words.pack_rows(one.codes, 4).t() for one in experts])
        scales = torch.stack([one.scales.t() for one in experts])
        layer.load_from_tensors({"weight": codes, "weight_scale": scales})
        layer.transform()
        layers.append(layer)
        tuned.append(get_heuristics_config(layer_config=layer.humming_config, gemm_type="indexed"))
    texts = [json.dumps(one) for one in tuned]

    def multiply(number: int, x: Tensor, choices: int, rows: int, found: tuple[Tensor, ...]) -> Tensor:
        layer = layers[number]
        y = x.new_empty(rows, layer.shape_n)
        return humming_forward(
            layer.humming_config, inputs=x, weight=layer.weight, weight_scale=layer.weight_scale,
            outputs=y, locks=layer.locks, top_k=choices, valid_shape_m=rows, compute_config=compute,
            tuning_config=texts[number], sorted_ids=found[0], expert_ids=found[1], num_tokens_padded=found[2],
        )  # fmt: skip

    def run(x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        m, choices = index.shape
        rows = m * choices
        first, last = (
            next(config["block_shape"][0] for low, high, config in one if low < rows <= high) for one in tuned
        )
        found = in_blocks(index, count, first)
        both = multiply(0, x, choices, rows, found)
        activated, _, _ = may_process_input(
            layers[1].humming_config, inputs=both, outputs=x.new_empty(rows, inner),
            activation_type="binary_split", activation_impl="(a / (1.f + expf(-a))) * b",
        )  # fmt: skip
        answers = multiply(1, activated, 1, rows, found if last == first else in_blocks(index, count, last))
        return weighted_sum(answers.view(m, choices, hidden), shares)

    return run


def weighted_sum(answers: Tensor, shares: Tensor) -> Tensor:
    """The sum over choices of answers (tokens, choices, n) times shares (tokens, choices), in one kernel."""
    tokens, choices, n = answers.shape
    y = answers.new_empty(tokens, n)
    _weighted_sum[(tokens, triton.cdiv(n, 1024))](answers, shares, y, n, choices, BLOCK=1024)
    return y


@triton.jit
def _weighted_sum(answers, shares, y, n, choices: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(choices):
        row = (token * choices + choice).to(tl.int64)
        total += tl.load(answers + row * n + at, mask=at < n).to(tl.float32) * tl.load(shares + row)
    tl.store(y + token * n + at, total.to(y.dtype.element_ty), mask=at < n)


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
    parser.add_argument("--as", dest="capability", help="as with this compute capability")
    asked = parser.parse_args()
    if asked.capability:
        major, minor = map(int, asked.capability.split("."))
        kernels.choose_for_experts = lambda *given: choose_for_experts(*given[:4], (major, minor), *given[5:])
    layers: dict[str, Callable[[Weights], Layer]] = {"ours": ours}
    if os.environ.get("VLLM_MOE_C"):
        torch.ops.load_library(os.environ["VLLM_C"])
        torch.ops.load_library(os.environ["VLLM_MOE_C"])
        layers["vllm"] = vllm
        if find_spec("humming"):
            layers["humming"] = humming
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
        made = {kind: [make(one) for one in copies] for kind, make in layers.items()}
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
            for kind, ready in made.items():
                answers[kind] = ready[0](x, *routes[0]).double()
                cell[kind] = microseconds(partial(in_turn, ready, x, routes), times)
            for kind, theirs in answers.items():
                away = (answers["ours"] - theirs).norm() / theirs.norm()
                assert away < 2e-3, f"{name} {m}: {kind}'s answer is {away:.4f} away"
            found.setdefault(name, {})[str(m)] = cell
            line = "  ".join(f"{kind} {us:8.1f}" for kind, us in cell.items())
            ratios = "  ".join(
                f"{kind}/ours {us / cell['ours']:.2f}" for kind, us in cell.items() if kind != "ours"
            )
            print(f"{name:16} {m:5}  {line}  {ratios}", flush=True)
        del copies, made
    for m in asked.tokens.split(","):
        for kind in layers.keys() - {"ours"}:
            ratios = [cells[m][kind] / cells[m]["ours"] for cells in found.values()]
            mean = math.prod(ratios) ** (1 / len(ratios))
            print(f"{m:>5} tokens: {mean:.2f} times as fast as {kind} (geometric mean)")
    kept = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "us": found}
    asked.out.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
