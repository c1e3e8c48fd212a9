"""One block of the GPTQ sweep as a single GPU kernel over all output channels of a batch of matrices."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# Output channels of a program, which is one warp: a row waits for the one before it, so it is how long one
# takes that counts, not how many programs there are.
COLUMNS = 16


@triton.jit
def _kernel(
    target,
    w,
    scales,
    groups,
    feedback,
    errors,
    codes,
    first,
    rows,
    n,
    of_matrix,
    of_scales,
    of_groups,
    of_feedback,
    of_row,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    matrix = tl.program_id(1).to(tl.int64)
    before = matrix * of_matrix + first.to(tl.int64) * n
    w += before
    errors += before
    codes += before
    target += matrix * rows * n
    scales += matrix * of_scales
    groups += matrix * of_groups + first
    feedback += matrix * of_feedback
    t = tl.load(target + row[:, None] * n + column[None, :], mask=(row < rows)[:, None] & inside[None, :])
    # what a row needs is fetched while the one before it is rounded
    group = tl.load(groups)
    s = tl.load(scales + group * n + column, mask=inside, other=1.0)
    w_i = tl.load(w + column, mask=inside, other=0.0)
    old = tl.load(errors + column, mask=inside, other=0.0)
    f = tl.load(feedback + row, mask=(row > 0) & (row < rows), other=0.0)
    group = tl.load(groups + tl.minimum(1, rows - 1))
    for i in range(rows):
        after = tl.minimum(i + 1, rows - 1)
        next_s = tl.load(scales + group * n + column, mask=inside, other=1.0)
        next_w = tl.load(w + after * n + column, mask=inside, other=0.0)
        next_old = tl.load(errors + after * n + column, mask=inside, other=0.0)
        next_f = tl.load(feedback + after * of_row + row, mask=(row > after) & (row < rows), other=0.0)
        group = tl.load(groups + tl.minimum(i + 2, rows - 1))
        t_i = tl.sum(tl.where(row[:, None] == i, t, 0.0), axis=0)
        code = libdevice.rint(tl.div_rn(t_i, s))
        code = tl.minimum(tl.maximum(code, LOW), -LOW - 1)
        error = w_i - code * s
        change = error - old
        tl.store(errors + i * n + column, error, mask=inside)
        tl.store(codes + i * n + column, code.to(tl.int8), mask=inside)
        t += f[:, None] * change[None, :]
        s, w_i, old, f = next_s, next_w, next_old, next_f


def round_block(
    rows: slice,
    target: Tensor,
    w: Tensor,
    scales: Tensor,
    groups: Tensor,
    feedback: Tensor,
    errors: Tensor,
    codes: Tensor,
    bits: int,
) -> None:
    """Round some rows of each matrix in order, as `gptq._round_block` does; all but feedback contiguous.

    The current device must be theirs. A sweep waits for the host, so nothing is sliced here.
    """
    batch, b, n = target.shape
    if feedback.stride(2) != 1:
        feedback = feedback.contiguous()
    _kernel[(triton.cdiv(n, COLUMNS), batch)](
        target,
        w,
        scales,
        groups,
        feedback,
        errors,
        codes,
        rows.start,
        b,
        n,
        w.stride(0),
        scales.stride(0),
        groups.stride(0),
        feedback.stride(0),
        feedback.stride(1),
        LOW=-(2 ** (bits - 1)),
        ROWS=triton.next_power_of_2(b),
        COLUMNS=COLUMNS,
        num_warps=1,
    )
