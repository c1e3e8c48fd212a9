"""GPTQ in feedback form: codes that minimise the output error tr(E^T H E), E = W - dequantized W.

Rows (input channels) are rounded one after another; each is first moved by a linear feedback of the errors
made so far (the LDL form of GPTQ, arXiv 2307.13304, section 3.2 and theorem 6). With H = U D U^T, U unit
upper triangular, the feedback matrix is U's strict upper part: one Cholesky factorisation and no inverse.
The same sweep with the feedback matrix H / diag(H), zero on its diagonal, is cyclic coordinate descent:
each row is rounded to the best code given all others. Sweeps of it after GPTQ never raise the error.

Matrices of one shape, as the experts of a layer have, are solved side by side: everything here goes by rows,
one step after another, and a GPU would wait for the steps of a single small matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_convert.solvers.factor import Factor, diagonals
from marlin_convert.solvers.scales import search_scales

BLOCK = 128


@dataclass(frozen=True)
class Solution:
    """What a solver found for a weight of shape (k, n)."""

    codes: Tensor  # (k, n) uint8, zero at 2 ** (bits - 1)
    scales: Tensor  # (groups, n) float16
    damping: (
        float | None
    )  # what it took to factorise H; None: it could not be, weights are rounded to nearest
    mask: Tensor | None = None  # (k, n) bool, what 2:4 sparsity keeps; codes are zero elsewhere


def solve(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    damping: float,
    sweeps: int,
    positive: bool = False,
) -> Solution:
    """Codes and scales for `weight` (n, k), any float type, given the Hessian (k, k) float32.

    `damping` is the share of the mean diagonal added to it, raised tenfold up to 1 until the Hessian can be
    factorised; `sweeps` of coordinate descent follow. Rows are taken in order of falling diag(H), groups
    and storage stay in natural order (static activation order). Scales take the sign that suits the codes,
    unless they are to be `positive`. Weights must be finite. The Hessian is in another order meanwhile.
    """
    factor = Factor(hessian[None], damping)
    (found,) = solve_batch(
        weight[None], factor, bits=bits, group_size=group_size, sweeps=sweeps, positive=positive
    )
    factor.restore()
    return found


def solve_batch(
    weights: Tensor,
    factor: Factor,
    *,
    bits: int,
    group_size: int,
    sweeps: int,
    positive: bool = False,
) -> list[Solution]:
    """What `solve` finds for each of `weights` (batch, n, k), given their factor; it takes the triangles."""
    wt = weights.mT.to(torch.float32).contiguous()
    diagonal = factor.natural(diagonals(factor.hessians))
    mean = diagonal.mean(-1, keepdim=True)
    importance = torch.where(mean > 0, diagonal + factor.damping * mean, 1.0)
    scales = search_scales(wt, importance, group_size, bits, positive=positive)
    groups = factor.order // group_size

    w = factor.ordered(wt)
    del wt
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    errors = torch.zeros_like(w)
    round_block = _round_block
    if w.is_cuda:
        # imported here because Triton exists only where there is a GPU
        from marlin_convert.solvers.gptq_triton import round_block

    def choose(rows: slice, target: Tensor, feedback: Tensor) -> None:
        round_block(rows, target, w, scales, groups, feedback, errors, codes, bits)

    # Triton launches on the current device, whatever it is given
    with torch.cuda.device_of(w), feedback_precision(w.device):
        feedback = factor.give_up_uppers()
        feedback.div_(diagonals(feedback).clone()[:, None])
        sweep(w, feedback, errors, choose, triangular=True)
        del feedback
        if sweeps:
            descent = _descent(factor.hessians, factor.used)
            for _ in range(sweeps):
                sweep(w, descent, errors, choose, triangular=False)
            del descent
    stored = factor.natural((codes + 2 ** (bits - 1)).to(torch.uint8))
    return [Solution(*one) for one in zip(stored, scales.half(), factor.used, strict=True)]


def bytes_taken(k: int, n: int) -> int:
    """Bytes that a weight (n, k) takes while it is solved for, with what its inputs sum up to.

    Of (k, k) float32 the Hessian, the products with the original's inputs and what is made of the Hessian; of
    (k, n) targets, those in order, errors and what a Hessian makes of them, in float32, and codes.
    """
    return 12 * k * k + 17 * k * n


def output_energy(hessian: Tensor, x: Tensor) -> Tensor:
    """x^T H x of every column of x (..., k, n): (..., n)."""
    return (hessian @ x).mul_(x).sum(-2)


def _descent(hessians: Tensor, damping: list[float | None]) -> Tensor:
    """The feedback matrices of coordinate descent: column i is H[:, i] / H[i, i], zero at i.

    Where no damping helps there is no descent, and all is zero.
    """
    diagonal = diagonals(hessians)
    # not waited for: the GPU is still busy with the weights
    shares = torch.tensor([share or 0.0 for share in damping]).to(hessians.device, non_blocking=True)
    diagonal = diagonal + shares[:, None] * diagonal.mean(-1, keepdim=True)
    feedback = hessians / diagonal[:, None]
    diagonals(feedback).zero_()
    for number, share in enumerate(damping):
        if share is None:
            feedback[number] = 0
    return feedback


def sweep(
    w: Tensor,
    feedback: Tensor,
    errors: Tensor,
    choose: Callable[[slice, Tensor, Tensor], None],
    *,
    triangular: bool,
) -> None:
    """Go through every w of (batch, k, n) once, a block of rows at a time.

    `choose(rows, target, feedback)` replaces errors[:, rows]; target (batch, b, n) is w[rows] +
    feedback[:, rows]^T errors, all of it that is known before the block, feedback (batch, b, b) what is left
    to it: between blocks the product goes as one of matrices.
    """
    start = 0
    for some, of_rows in zip(w.split(BLOCK, 1), feedback.split(BLOCK, 2), strict=True):
        rows = slice(start, start + some.shape[1])
        if triangular:
            target = torch.baddbmm(some, of_rows[:, :start].mT, errors[:, :start])
        else:
            target = torch.baddbmm(some, of_rows.mT, errors)
        choose(rows, target, of_rows[:, rows])
        start = rows.stop


def _round_block(
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
    """Round some `rows` of each matrix; `target` (batch, b, n) holds the feedback of all errors before them.

    w, errors float32 and codes int8 are (batch, k, n), of which those of the rows are set; scales (batch,
    groups, n), and `groups` (batch, k) says which a row has; feedback (batch, b, b).
    """
    for number in range(len(w)):
        scale = scales[number, groups[number, rows]]
        codes[number, rows] = _round_rows(
            target[number], w[number, rows], scale, feedback[number], errors[number, rows], bits
        )


def _round_rows(
    target: Tensor, w: Tensor, scale: Tensor, feedback: Tensor, errors: Tensor, bits: int
) -> Tensor:
    """Round the rows (b, n) of one matrix."""
    codes = torch.empty_like(w)
    change = torch.empty_like(w)
    for i in range(w.shape[0]):
        if i:
            target[i].addmv_(change[:i].T, feedback[:i, i])
        codes[i] = round_to_codes(target[i], scale[i], bits)
        error = torch.addcmul(w[i], codes[i], scale[i], value=-1)
        torch.sub(error, errors[i], out=change[i])
        errors[i] = error
    return codes


def round_to_codes(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The signed codes nearest to w / scale."""
    low = -(2 ** (bits - 1))
    return torch.round(w / scale).clamp_(low, -low - 1)


class feedback_precision:
    """Feedback products run on a GPU's tensor cores in TF32: errors of 1e-3 in a correction are harmless."""

    def __init__(self, device: torch.device):
        self._switch = torch.backends.cuda.matmul if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._switch:
            self._before = self._switch.fp32_precision
            self._switch.fp32_precision = "tf32"

    def __exit__(self, *_: object) -> None:
        if self._switch:
            self._switch.fp32_precision = self._before
