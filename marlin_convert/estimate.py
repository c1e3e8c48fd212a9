"""What a conversion will take, from its plan and a measured matrix product on the device."""

import time
from dataclasses import dataclass

import torch

from marlin_convert.models.hidden import TOKENS
from marlin_convert.plan import Plan

# How far the parts that are no large matrix product stretch the whole, seen on an EPYC and on an H200.
OVERHEAD = 2.0

# How much longer pruning takes: six masks for every quad, and the original model walks along.
PRUNING = 2.0


@dataclass(frozen=True)
class Estimate:
    """Seconds and peak bytes, both rough."""

    seconds: float
    memory: float


def estimate(plan: Plan, device: torch.device) -> Estimate:
    """Seconds from counted products at the device's measured rate; memory from the largest things held."""
    block = [fate for fate in plan.worked_on_in(0)] or list(plan.fates)
    weights = sum(fate.k * fate.n for fate in block)
    if plan.repack:
        return Estimate(plan.output_bytes / 0.5e9, 12.0 * max(fate.k * fate.n for fate in block))
    tokens = plan.recipe.samples * plan.recipe.sequence_length
    stages = {fate.k: sum(other.n for other in block if other.k == fate.k) for fate in block}
    hessians = 2.0 * tokens * sum(k * k for k in stages)
    solving = sum((1 + 2 * plan.recipe.sweeps) * k * k * n for k, n in stages.items())
    seconds = OVERHEAD * plan.blocks * (2 * tokens * weights + hessians + solving) / _rate(device)
    hidden = 2.0 * tokens * min(stages)
    if plan.sparsity:
        seconds, hidden = PRUNING * seconds, 2 * hidden
    width = max(fate.n for fate in block)
    held = 24.0 * max(k * n for k, n in stages.items()) + 12.0 * max(stages) ** 2
    return Estimate(seconds, hidden + held + 2.0 * weights + 12.0 * TOKENS[device.type] * width)


def _rate(device: torch.device) -> float:
    """Floating-point operations a second in a bfloat16 product."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    a @ a
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    a @ a
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 2 * size**3 / (time.perf_counter() - started)
