"""What a conversion will take, from its plan and the speed of the calls that it is made of, on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from marlin_convert.models.blocks import bf16_units, rounding_linear
from marlin_convert.models.hidden import TOKENS
from marlin_convert.models.memory import memory_for_activations
from marlin_convert.plan import Plan
from marlin_convert.solvers import gptq
from marlin_convert.solvers.hessian import Hessian

# How far the parts that are no large matrix product stretch the whole on a GPU, seen on an H200.
OVERHEAD = 2.0

# How much longer pruning takes: six masks for every quad.
PRUNING = 1.5

# Bytes a second that a repack reads, packs and writes.
REPACKED = 0.5e9

# Inputs and outputs of the linear, and tokens, that a CPU's speeds are measured with: large enough for the
# products to run as in a model, and done in a second on a slow one.
SIZE, SAMPLE = 1024, 1024


@dataclass(frozen=True)
class Estimate:
    """Seconds and peak bytes, both rough."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class _Work:
    """What there is to do in a block: products of a token with weights (k, n), Hessians of inputs k."""

    tokens: int
    length: int
    stages: dict[int, int]  # the outputs of the linears that read k inputs
    attention: int  # inputs of the attention's last linear: the heads side by side

    @property
    def weights(self) -> int:
        return sum(k * n for k, n in self.stages.items())

    @property
    def hessians(self) -> float:
        """Multiply-adds of x^T x, of which half is the mirror of the other."""
        return self.tokens * sum(k * (k + 512) / 2 for k in self.stages)

    @property
    def products(self) -> float:
        """Multiply-adds of what is wanted of the inputs, x^T x0 or x^T y0."""
        return self.tokens * sum(k * min(k, n) for k, n in self.stages.items())


def estimate(plan: Plan, device: torch.device) -> Estimate:
    """Seconds from the work counted and the speeds measured; memory from the largest things held."""
    block = plan.worked_on_in(0) or list(plan.fates.values())
    if plan.repack:
        return Estimate(plan.output_bytes / REPACKED, 12.0 * max(fate.k * fate.n for fate in block))
    stages = {fate.k: sum(other.n for other in block if other.k == fate.k) for fate in block}
    last = next(part for parts in plan.structure.parts for part in parts).last[0]
    heads = next((fate.k for fate in plan.fates.values() if fate.name.endswith("." + last)), min(stages))
    recipe = plan.recipe
    work = _Work(recipe.samples * recipe.sequence_length, recipe.sequence_length, stages, heads)
    of_a_block = _on_gpu if device.type == "cuda" else _on_cpu
    seconds = plan.blocks * of_a_block(plan, work, device)
    hidden = 2.0 * work.tokens * min(stages) * (2 if plan.compensates else 1)
    if plan.sparsity:
        seconds *= PRUNING
    width = max(fate.n for fate in block)
    held = 24.0 * max(k * n for k, n in stages.items()) + 12.0 * max(stages) ** 2
    return Estimate(seconds, hidden + held + 2.0 * work.weights + 12.0 * TOKENS[device.type] * width)


def _on_gpu(plan: Plan, work: _Work, device: torch.device) -> float:
    """Seconds of a block where products in 16 bits are nearly all there is to do."""
    size = 8192
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)

    def product() -> None:
        a @ a
        torch.cuda.synchronize(device)

    rate = size**3 / _seconds(product)
    solving = sum((0.5 + plan.recipe.sweeps) * k * k * n for k, n in work.stages.items())
    walks = 2 if plan.compensates else 1
    sums = 2 * work.hessians + (work.products if plan.compensates else 0)
    return OVERHEAD * (walks * work.tokens * work.weights + sums + solving) / rate


def _on_cpu(plan: Plan, work: _Work, device: torch.device) -> float:
    """Seconds of a block: forwards, Hessians and solving, each by the calls that are made for it."""
    bf16 = plan.dtype == torch.bfloat16 and bf16_units()
    x = torch.randn(SAMPLE, SIZE).to(plan.dtype).float()
    linear = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16 if bf16 else torch.float32)
    with torch.no_grad():
        product = _seconds(partial(rounding_linear, linear, plan.dtype, x)) / (SAMPLE * SIZE * SIZE)
        heads = torch.randn(1, 4, work.length, 64)
        attend = partial(nn.functional.scaled_dot_product_attention, heads, heads, heads, is_causal=True)
        attention = _seconds(attend) / heads.numel() * work.tokens * work.attention
        between = _seconds(lambda: nn.functional.silu(x) * x) / x.numel()
    hessian = Hessian(SIZE, device, bf16_units=bf16)
    squares = _seconds(lambda: hessian.add(x.to(plan.dtype))) / (SAMPLE * SIZE * (SIZE + 512) / 2)

    # what does not stay in memory between the stages of a block is computed again
    kept = memory_for_activations(device) / (plan.dtype.itemsize * work.tokens * (3 * work.attention))
    again = 1 + max(0.0, 1 - kept)
    elementwise = work.tokens * sum(8 * k + 2 * n for k, n in work.stages.items())
    forward = again * (work.tokens * work.weights * product + attention + elementwise * between)
    if not plan.compensates:
        return forward + work.hessians * squares + _solving(plan, work)
    return 2 * forward + (work.hessians + work.products) * squares + _solving(plan, work)


def _solving(plan: Plan, work: _Work) -> float:
    """Seconds to solve the linears of a block on a CPU: products, and a few operations for every row."""
    settings: dict[str, Any] = {
        "bits": 4,
        "group_size": 128,
        "damping": plan.recipe.damping,
        "sweeps": plan.recipe.sweeps,
    }
    a = torch.randn(SIZE, SIZE)
    rate = 128 * SIZE * SIZE / _seconds(lambda: torch.addmm(a[:128], a[:128], a))
    k, few, many = 256, 128, 1024

    def products(k: int, n: int) -> float:
        # a sweep of half the rows, the others of all, two energies; the factorisation runs at half the rate
        return (k * k * n * (2.5 + plan.recipe.sweeps) + k**3 / 3) / rate

    def solve(n: int) -> float:
        weight, hessian = torch.randn(n, k), torch.eye(k)
        return max(0.0, _seconds(lambda: gptq.solve(weight, hessian, **settings)) - products(k, n))

    narrow, wide = solve(few), solve(many)
    of_a_weight = max(0.0, wide - narrow) / (k * (many - few))
    of_a_row = max(0.0, narrow / k - few * of_a_weight)
    return sum(products(k, n) + k * of_a_row + k * n * of_a_weight for k, n in work.stages.items())


def _seconds(call: Callable[[], object]) -> float:
    """How long a call takes: the least of three, after one that warms up."""
    call()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
