"""One block of the GPTQ sweep as a single GPU kernel over all output channels of a batch of matrices."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit
def _kernel(
    target,
    w,
    scale,
    feedback,
    errors,
    codes,
    rows,
    n,
    stride,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    matrix = tl.program_id(1).to(tl.int64)
    target += matrix * rows * n
    scale += matrix * rows * n
    codes += matrix * rows * n
    feedback += matrix * rows * rows
    w += matrix * stride
    errors += matrix * stride
    at = row[:, None] * n + column[None, :]
    t = tl.load(target + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    for i in range(rows):
        here = i * n + column
        s = tl.load(scale + here, mask=inside, other=1.0)
        t_i = tl.sum(tl.where(row[:, None] == i, t, 0.0), axis=0)
        code = libdevice.rint(tl.div_rn(t_i, s))
        code = tl.minimum(tl.maximum(code, LOW), -LOW - 1)
        error = tl.load(w + here, mask=inside, other=0.0) - code * s
        change = error - tl.load(errors + here, mask=inside, other=0.0)
        tl.store(errors + here, error, mask=inside)
        tl.store(codes + here, code.to(tl.int8), mask=inside)
        f = tl.load(feedback + i * rows + row, mask=(row > i) & (row < rows), other=0.0)
        t += f[:, None] * change[None, :]


def round_block(
    target: Tensor, w: Tensor, scale: Tensor, feedback: Tensor, errors: Tensor, bits: int
) -> Tensor:
    """Round the rows of one block in order, as `gptq._round_block` does.

    All float32, (batch, b, n) but feedback (batch, b, b); `w` and `errors` are rows of larger tensors of one
    shape. Updates `errors`, returns signed codes int8.
    """
    batch, rows, n = w.shape
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    columns = 16  # one warp each: the rows' dependency makes latency count, not occupancy
    with torch.cuda.device_of(w):  # Triton launches on the current device, whatever it is given
        _kernel[(triton.cdiv(n, columns), batch)](
            target,
            w,
            scale,
            feedback.contiguous(),
            errors,
            codes,
            rows,
            n,
            w.stride(0),
            LOW=-(2 ** (bits - 1)),
            ROWS=triton.next_power_of_2(rows),
            COLUMNS=columns,
            num_warps=1,
        )
    return codes
