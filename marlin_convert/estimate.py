"""What a conversion will take, from its plan and the speed of the calls that it is made of, on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from marlin_convert.chunks import experts_at_once, read_of_expert
from marlin_convert.matrix import Fate
from marlin_convert.models.blocks import bf16_units, rounding_linear
from marlin_convert.models.hidden import TOKENS as BATCH
from marlin_convert.models.memory import free_memory, memory_for_activations
from marlin_convert.plan import Plan
from marlin_convert.solvers import gptq, sparsity
from marlin_convert.solvers.hessian import Hessian
from marlin_convert.solvers.straight_through import POSITIONS
from marlin_convert.tune import DENSE, SPARSE, STEP, TOKENS

# How far the parts that are no large matrix product stretch the whole on a GPU, seen on an H200.
OVERHEAD = 2.0
# Seconds that any matrix takes beside, of many small ones: launches, which the GPU waits for. And that any
# weight of experts takes to be read, packed, compared and handed to the disk. Seen on H100s with layers of
# Qwen3-30B-A3B's shape and, before experts were multiplied many at a time, DeepSeek-V3's.
EACH, EACH_WEIGHT = 0.002, 2.1e-9
# Seconds of a command on a GPU before the first block and after the last.
START = 10.0

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
class _Stage:
    """The linears of a block that read k inputs, n outputs in all: `count` of them that are solved apart.

    `share` is that of the tokens that each of these sees: experts do not see all.
    """

    k: int
    n: int
    share: float = 1.0
    count: int = 1


@dataclass(frozen=True)
class _Work:
    """What there is to do in a block: products of a token with weights (k, n), Hessians of inputs k."""

    tokens: int
    length: int
    stages: list["_Stage"]
    attention: int  # inputs of the attention's last linear: the heads side by side

    @property
    def weights(self) -> float:
        """Of those that a token meets."""
        return sum(one.share * one.k * one.n for one in self.stages)

    @property
    def hessians(self) -> float:
        """Multiply-adds of x^T x, of which half is the mirror of the other."""
        return self.tokens * sum(one.share * one.count * one.k * (one.k + 512) / 2 for one in self.stages)

    @property
    def products(self) -> float:
        """Multiply-adds of what is wanted of the inputs, x^T x0 or x^T y0."""
        return self.tokens * sum(one.share * one.k * min(one.count * one.k, one.n) for one in self.stages)


def estimate(plan: Plan, device: torch.device) -> Estimate:
    """Seconds from the work counted and the speeds measured; memory from the largest things held."""
    number, block = _largest(plan)
    if plan.repack:
        return Estimate(plan.output_bytes / REPACKED, 12.0 * max(fate.k * fate.n for fate in block))
    work = _work(plan, block)
    seconds = (
        on_gpu(plan, _rate(device)) if device.type == "cuda" else plan.blocks * _on_cpu(plan, work, device)
    )
    if plan.sparsity:
        seconds *= PRUNING
    memory = _memory(plan, number, work, max(fate.n for fate in block), device)
    if plan.tunes:
        seconds += _tuning(plan, device)
        memory = max(memory, tuning_memory(plan, device))
    return Estimate(seconds, memory)


def _largest(plan: Plan) -> tuple[int, list[Fate]]:
    """The number of the block with the most weights that are worked on, and these."""
    number = max(range(plan.blocks), key=lambda i: sum(fate.k * fate.n for fate in plan.worked_on_in(i)))
    return number, plan.worked_on_in(number) or list(plan.fates.values())


def _work(plan: Plan, block: list[Fate]) -> _Work:
    """What there is to do in a block."""
    stages = _stages(plan, block)
    last = next(part for parts in plan.structure.parts for part in parts).last[0]
    heads = next(
        (fate.k for fate in plan.fates.values() if fate.name.endswith("." + last)),
        min(one.k for one in stages),
    )
    recipe = plan.recipe
    return _Work(recipe.samples * recipe.sequence_length, recipe.sequence_length, stages, heads)


def _memory(plan: Plan, number: int, work: _Work, width: int, device: torch.device) -> float:
    """Bytes on the device at the most while a block is solved whose widest linear has `width` outputs."""
    walks = 2 if plan.compensates else 1
    path = f"{plan.structure.blocks}.{number}"
    states = 2.0 * work.tokens * plan.fates[f"{path}.{plan.structure.stages(number)[0][0]}"].k
    hidden = walks * states
    at_once = experts_at_once(plan, number, device)
    for part in plan.structure.parts[number]:
        if part.experts:
            # what enters them is kept beside it, with what attention gives and the original's experts do
            hidden += 2 * walks * states + (walks - 1) * states * (1 if device.type == "cuda" else 2)
            hidden += at_once * read_of_expert(plan, number, part)
    solved = max(
        (at_once if one.count > 1 else 1) * gptq.bytes_taken(one.k, one.n // one.count) for one in work.stages
    )
    if plan.sparsity:  # one matrix after another
        solved += max(sparsity.bytes_beside(one.k, one.n // one.count) for one in work.stages)
    in_16_bits = device.type == "cuda" or (plan.dtype == torch.bfloat16 and bf16_units())
    weights = (2.0 if in_16_bits else 4.0) * sum(one.k * one.n for one in work.stages)
    packed = sum(one.k * one.n for one in work.stages if one.count > 1) * 0.6
    # while nothing is solved, all of a micro-batch that goes to experts, is in them and comes from them
    to_experts = sum(one.share * one.count * one.k for one in work.stages if one.count > 1)
    batch = 12.0 * BATCH[device.type]
    memory = hidden + weights + packed + max(solved + batch * width, batch * to_experts)
    # the next block is read meanwhile, where there is room
    left = free_memory(device) - walks * states - weights
    return memory + (weights if plan.blocks > 1 and 4 * weights < left else 0)


def _stages(plan: Plan, block: list[Fate]) -> list[_Stage]:
    """The stages of a block, those of one width as one."""
    found: dict[tuple[int, bool], _Stage] = {}
    for fate in block:
        part = plan.structure.part_of_experts(fate.name)
        before = found.get((fate.k, part is not None), _Stage(fate.k, 0))
        count, share = (part.experts, part.choices / part.experts) if part else (1, 1.0)
        found[fate.k, part is not None] = _Stage(fate.k, before.n + fate.n, share, count)
    return list(found.values())


def tuning_memory(plan: Plan, device: torch.device) -> float:
    """Bytes on the device at the most while a model is tuned there (tune.py).

    Of Llama-3-8B on a GPU, 8 sequences of 1024 tokens a step, in GB: of 6.98e9 packed weights 14.0 for the
    original, 14.0 for latents and 27.9 for their moments, and 0.9 for scales (a mask of 2:4 7.0 more); 4.2
    for the embedding and the head; 4.6 for what enters its 32 blocks; 2.7 for one block computed again and
    2.1 for its weights and the largest of them moved; 1.7 for the logits of one sequence. In all 72.
    """
    bytes_of = 2 if device.type == "cuda" else 4  # of what is multiplied; the rest is float32
    weights = sum(
        fate.k * fate.n * (bytes_of + (2 if fate.layout.bits == 4 else 4) + 4 + fate.layout.sparse)
        for fate in plan.packed
    )
    groups = sum(
        fate.n * (1 if fate.layout.group_size == -1 else fate.k // fate.layout.group_size)
        for fate in plan.packed
    )
    narrow = {f"{fate.name}.weight" for fate in plan.dense}
    others = sum(
        spec.nbytes // spec.dtype.itemsize * (bytes_of if spec.name in narrow else 4)
        for spec in plan.specs
        if spec.name not in plan.owner and spec.name not in plan.structure.idle
    )
    block = plan.worked_on_in(0) or plan.packed
    length = plan.recipe.sequence_length
    tokens, hidden = max(STEP, length), block[0].k
    entering = 4 * tokens * hidden * (plan.blocks + 2)
    again = 2 * bytes_of * tokens * sum(fate.k + fate.n for fate in block)
    moved = 28 * max(fate.k * fate.n for fate in plan.packed) + bytes_of * sum(
        fate.k * fate.n for fate in block
    )
    logits = plan.vocabulary * (4 * bytes_of * length + 20 * min(POSITIONS, length))
    return float(weights + 16 * groups + others + entering + again + moved + logits)


def _tuning(plan: Plan, device: torch.device) -> float:
    """Seconds that tuning takes: a forward of the original, two of the student, and its backward of two."""
    epochs = (SPARSE if plan.sparsity else DENSE).epochs
    tokens = epochs * max(TOKENS, plan.recipe.samples * plan.recipe.sequence_length)
    weights = sum(fate.k * fate.n for fate in plan.fates.values()) + plan.vocabulary * plan.packed[0].k
    return OVERHEAD * 5 * tokens * weights / _rate(device)


def on_gpu(plan: Plan, rate: float) -> float:
    """Seconds where products in 16 bits, `rate` multiply-adds a second, are nearly all there is to do.

    But for experts, whose products are small.
    """
    work = _work(plan, _largest(plan)[1])
    solving = sum((0.5 + plan.recipe.sweeps) * one.k * one.k * one.n for one in work.stages)
    walks = 2 if plan.compensates else 1
    sums = 2 * work.hessians + (work.products if plan.compensates else 0)
    each = sum(
        one.count * EACH + (one.k * one.n * EACH_WEIGHT if one.count > 1 else 0) for one in work.stages
    )
    products = walks * work.tokens * work.weights + sums + solving
    return START + plan.blocks * (each + OVERHEAD * products / rate)


def _rate(device: torch.device) -> float:
    """Multiply-adds a second of the products that a model is tuned with."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else SIZE
    a = torch.randn(size, size, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)

    def product() -> None:
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)

    return size**3 / _seconds(product)


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
    elementwise = work.tokens * sum(one.share * (8 * one.k + 2 * one.n) for one in work.stages)
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

    swept = 0.5 + plan.recipe.sweeps  # the first sweep is of half the rows
    # beside them two energies, and what is wanted and the regression to it
    every = swept + 2 + 2 * plan.compensates

    def products(k: int, n: int, times: float, count: int = 1) -> float:
        # the factorisation runs at half the rate
        return (k * k * n * times + count * k**3 / 3) / rate

    def solve(n: int) -> float:
        weight, hessian = torch.randn(n, k), torch.eye(k)
        return max(0.0, _seconds(lambda: gptq.solve(weight, hessian, **settings)) - products(k, n, swept))

    narrow, wide = solve(few), solve(many)
    of_a_weight = max(0.0, wide - narrow) / (k * (many - few))
    of_a_row = max(0.0, narrow / k - few * of_a_weight)
    return sum(
        products(one.k, one.n, every, one.count) + one.count * one.k * of_a_row + one.k * one.n * of_a_weight
        for one in work.stages
    )


def _seconds(call: Callable[[], object]) -> float:
    """How long a call takes: the least of three, after one that warms up."""
    call()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
