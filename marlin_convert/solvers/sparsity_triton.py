"""One block of the sweep over quads as a single GPU kernel over all output channels."""

from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

_MASKS = list(combinations(range(4), 2))


def _packed(positions: list[int]) -> int:
    return sum(position << 2 * mask for mask, position in enumerate(positions))


# One position of every mask's kept (A, B) and pruned (C, D), two bits each: a kernel cannot index a tuple.
A, B = (tl.constexpr(_packed([mask[i] for mask in _MASKS])) for i in (0, 1))
C, D = (tl.constexpr(_packed([mask[i] for mask in reversed(_MASKS)])) for i in (0, 1))


@triton.jit
def _row(rows, row, i):
    return tl.sum(tl.where(row[:, None] == i, rows, 0.0), axis=0)


@triton.jit
def _of(x, position: tl.constexpr):
    return x[0] if position == 0 else x[1] if position == 1 else x[2] if position == 2 else x[3]


@triton.jit
def _quadratic(matrix, x, y):
    return (tl.load(matrix) * x + 2 * tl.load(matrix + 1) * y) * x + tl.load(matrix + 3) * y * y


@triton.jit
def _rounded(x, scale, LOW: tl.constexpr):
    code = libdevice.rint(tl.div_rn(x, scale))
    return tl.minimum(tl.maximum(code, LOW), -LOW - 1) * scale


@triton.jit
def _away(w, errors, here, inside, goal):
    value = tl.load(w + here, mask=inside, other=0.0) - tl.load(errors + here, mask=inside, other=0.0)
    return value - goal


@triton.jit
def _pair(
    goal, scale, allowed, regression, here, n, inside,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    LOW: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Cost and values of keeping the positions A and B of a quad, and not C and D."""
    c = _of(goal, C)
    d = _of(goal, D)
    a = _of(goal, A) + tl.load(regression) * c + tl.load(regression + 1) * d
    b = _of(goal, B) + tl.load(regression + 2) * c + tl.load(regression + 3) * d
    cost = _quadratic(regression + 24, c, d)
    if SCALED:
        inner = regression + 48
        best_a = a
        best_b = b
        a = _rounded(best_a, tl.load(scale + here + A * n, mask=inside, other=1.0), LOW)
        moved = best_b + tl.load(inner + 1) / tl.load(inner + 3) * (best_a - a)
        b = _rounded(moved, tl.load(scale + here + B * n, mask=inside, other=1.0), LOW)
        cost += _quadratic(inner, a - best_a, b - best_b)
    # of a scale that is not finite there is nothing to compare
    cost = tl.where(cost == cost, cost, 3e38)
    if MASKED:
        both = tl.load(allowed + here + A * n, mask=inside, other=1)
        both *= tl.load(allowed + here + B * n, mask=inside, other=1)
        cost = tl.where(both != 0, cost, float("inf"))
    return cost, a, b


@triton.jit
def _kernel(
    target, w, scale, allowed, feedback, tables, metric, errors, kept, rows, n,
    LOW: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr, DESCENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    at = row[:, None] * n + column[None, :]
    t = tl.load(target + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    for quad in range(rows // 4):
        first = quad * 4
        here = first * n + column
        goal = (
            _row(t, row, first),
            _row(t, row, first + 1),
            _row(t, row, first + 2),
            _row(t, row, first + 3),
        )
        best = tl.full((COLUMNS,), float("inf"), tl.float32)
        chosen = tl.zeros((COLUMNS,), tl.int32)
        best_a = tl.zeros((COLUMNS,), tl.float32)
        best_b = tl.zeros((COLUMNS,), tl.float32)
        for mask in tl.static_range(6):
            cost, value_a, value_b = _pair(
                goal, scale, allowed, tables + quad * 72 + mask * 4, here, n, inside,
                (A >> 2 * mask) & 3, (B >> 2 * mask) & 3, (C >> 2 * mask) & 3, (D >> 2 * mask) & 3,
                LOW, SCALED, MASKED,
            )  # fmt: skip
            better = cost < best
            best = tl.where(better, cost, best)
            chosen = tl.where(better, mask, chosen)
            best_a = tl.where(better, value_a, best_a)
            best_b = tl.where(better, value_b, best_b)
        at_a = (A >> 2 * chosen) & 3
        at_b = (B >> 2 * chosen) & 3
        if DESCENT:
            off = (
                _away(w, errors, here, inside, goal[0]),
                _away(w, errors, here + n, inside, goal[1]),
                _away(w, errors, here + 2 * n, inside, goal[2]),
                _away(w, errors, here + 3 * n, inside, goal[3]),
            )
            now = tl.zeros((COLUMNS,), tl.float32)
            for i in tl.static_range(4):
                for j in tl.static_range(4):
                    now += tl.load(metric + quad * 16 + i * 4 + j) * _of(off, i) * _of(off, j)
            replaced = best < now
        else:
            replaced = inside
        for i in tl.static_range(4):
            keep = (at_a == i) | (at_b == i)
            value = tl.where(at_a == i, best_a, tl.where(at_b == i, best_b, 0.0))
            before = tl.load(errors + here + i * n, mask=inside, other=0.0)
            error = tl.load(w + here + i * n, mask=inside, other=0.0) - value
            change = tl.where(replaced, error - before, 0.0)
            tl.store(errors + here + i * n, error, mask=inside & replaced)
            tl.store(kept + here + i * n, keep.to(tl.uint8), mask=inside & replaced)
            f = tl.load(
                feedback + (first + i) * rows + row, mask=(row >= first + 4) & (row < rows), other=0.0
            )
            t += f[:, None] * change[None, :]


def solve_block(
    target: Tensor,
    w: Tensor,
    scale: Tensor | None,
    allowed: Tensor | None,
    feedback: Tensor,
    tables: Tensor,
    metric: Tensor | None,
    errors: Tensor,
    kept: Tensor,
    bits: int,
) -> None:
    """Give every quad of a block its best mask and values, as `sparsity._solve_block` does."""
    rows, n = w.shape
    columns = 16  # one warp each: the quads' dependency makes latency count, not occupancy
    with torch.cuda.device_of(w):  # Triton launches on the current device, whatever it is given
        _kernel[(triton.cdiv(n, columns),)](
            target, w,
            w if scale is None else scale,
            w if allowed is None else allowed.view(torch.uint8),
            feedback.contiguous(), tables,
            w if metric is None else metric.contiguous(),
            errors, kept.view(torch.uint8), rows, n,
            LOW=-(2 ** (bits - 1)), SCALED=scale is not None, MASKED=allowed is not None,
            DESCENT=metric is not None, ROWS=triton.next_power_of_2(rows), COLUMNS=columns, num_warps=1,
        )  # fmt: skip
