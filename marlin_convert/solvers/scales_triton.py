"""The scale search as a single GPU kernel: every weight is read once for a group that fits on chip."""

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit
def _kernel(
    weight, importance, fractions, scales, k, n, group_size,
    COUNT: tl.constexpr, LOW: tl.constexpr, POSITIVE: tl.constexpr, NORM: tl.constexpr,
    SMALLEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    first = group * group_size
    matrix = tl.program_id(2).to(tl.int64)
    weight += matrix * k * n
    importance += matrix * k
    scales += matrix * (k // group_size) * n
    largest = tl.zeros((COLUMNS,), tl.float32)
    smallest = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, group_size, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (first + row)[:, None].to(tl.int64) * n + column[None, :]
        w = tl.load(weight + at, mask=(row < group_size)[:, None] & inside[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(w, axis=0))
        smallest = tl.minimum(smallest, tl.min(w, axis=0))
    if POSITIVE:
        widest = tl.maximum(tl.div_rn(smallest, LOW), tl.div_rn(largest, -LOW - 1))
    else:
        widest = tl.div_rn(tl.where(largest > -smallest, largest, smallest), LOW)
    best_error = tl.full((COLUMNS,), float("inf"), tl.float32)
    best = tl.full((COLUMNS,), float("inf"), tl.float32)
    for candidate in range(COUNT):
        scale = widest * tl.load(fractions + candidate)
        scale = tl.where(tl.abs(scale) < SMALLEST, SMALLEST, scale).to(tl.float16).to(tl.float32)
        error = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, group_size, ROWS):
            row = start + tl.arange(0, ROWS)
            at = (first + row)[:, None].to(tl.int64) * n + column[None, :]
            w = tl.load(weight + at, mask=(row < group_size)[:, None] & inside[None, :], other=0.0)
            d = tl.load(importance + first + row, mask=row < group_size, other=0.0)
            code = libdevice.rint(tl.div_rn(w, scale[None, :]))
            code = tl.minimum(tl.maximum(code, LOW), -LOW - 1)
            away = tl.abs(code * scale[None, :] - w)
            error += tl.sum(tl.exp2(NORM * tl.log2(away)) * d[:, None], axis=0)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best = tl.where(better, scale, best)
    tl.store(scales + group.to(tl.int64) * n + column, best, mask=inside)


def search_scales(
    weight: Tensor,
    importance: Tensor,
    group_size: int,
    bits: int,
    *,
    positive: bool,
    candidates: Sequence[float],
    norm: float,
    smallest: float,
) -> Tensor:
    """The scale of every group, as `scales.search_scales` finds it; contiguous float32 tensors on a GPU."""
    *batch, k, n = weight.shape
    low = -(2 ** (bits - 1))
    scales = torch.empty(*batch, k // group_size, n, dtype=torch.float32, device=weight.device)
    fractions = _on(weight.device, tuple(candidates))
    columns = 32
    with torch.cuda.device_of(weight):  # Triton launches on the current device, whatever it is given
        _kernel[(triton.cdiv(n, columns), k // group_size, math.prod(batch))](
            weight, importance.contiguous(), fractions, scales, k, n, group_size,
            COUNT=len(candidates), LOW=low, POSITIVE=positive, NORM=norm, SMALLEST=smallest,
            ROWS=min(triton.next_power_of_2(group_size), 128), COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return scales


@cache
def _on(device: torch.device, candidates: tuple[float, ...]) -> Tensor:
    """They are the same for every weight, and to copy them the host would wait for all before."""
    return torch.tensor(candidates, device=device)
