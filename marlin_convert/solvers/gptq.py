"""GPTQ in feedback form: codes that minimise the output error tr(E^T H E), E = W - dequantized W.

Rows (input channels) are rounded one after another; each is first moved by a linear feedback of the errors
made so far (the LDL form of GPTQ, arXiv 2307.13304, section 3.2 and theorem 6). With H = U D U^T, U unit
upper triangular, the feedback matrix is U's strict upper part: one Cholesky factorisation and no inverse.
The same sweep with the feedback matrix H / diag(H), zero on its diagonal, is cyclic coordinate descent:
each row is rounded to the best code given all others. Sweeps of it after GPTQ never raise the error.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_convert.solvers.scales import search_scales

BLOCK = 128


@dataclass(frozen=True)
class Solution:
    """What a solver found for a weight of shape (k, n)."""

    codes: Tensor  # (k, n) uint8, zero at 2 ** (bits - 1)
    scales: Tensor  # (groups, n) float16
    error: Tensor  # (n,) float32, squared output error e^T H e of every output channel
    energy: Tensor  # (n,) float32, w^T H w of every output channel
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
    unless they are to be `positive`. Weights must be finite.
    """
    wt = weight.T.to(torch.float32).contiguous()
    k = wt.shape[0]
    mean = hessian.diagonal().mean()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    importance = hessian.diagonal() + damping * mean
    if not mean > 0:
        importance = torch.ones_like(importance)
    scales = search_scales(wt, importance, group_size, bits, positive=positive)
    group_of_row = (torch.arange(k, device=wt.device) // group_size)[order]

    ordered, w = hessian[order][:, order], wt[order]
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    errors = torch.zeros_like(w)
    round_block = _round_block
    if w.is_cuda:
        # imported here because Triton exists only where there is a GPU
        from marlin_convert.solvers.gptq_triton import round_block

    def choose(rows: slice, target: Tensor, feedback: Tensor) -> None:
        scale = scales[group_of_row[rows]]
        codes[rows] = round_block(target, w[rows], scale, feedback, errors[rows], bits)

    with feedback_precision(wt.device):
        used, feedback = factorise(ordered, damping)
        if feedback is None:
            codes[:] = round_to_codes(w, scales[group_of_row], bits)
            errors = w - codes * scales[group_of_row]
        else:
            feedback.div_(feedback.diagonal().clone())
            sweep(w, feedback, errors, choose, triangular=True)
            del feedback
            if sweeps:
                descent = _descent(ordered, used or damping)
                for _ in range(sweeps):
                    sweep(w, descent, errors, choose, triangular=False)
                del descent
        error = output_energy(ordered, errors)
        energy = output_energy(ordered, w)
    stored = torch.empty(wt.shape, dtype=torch.uint8, device=wt.device)
    stored[order] = (codes + 2 ** (bits - 1)).to(torch.uint8)
    return Solution(stored, scales.half(), error, energy, used)


def factorise(hessian: Tensor, damping: float) -> tuple[float | None, Tensor | None]:
    """(damping used, U) with hessian + damping = U U^T, U (k, k) upper triangular; Nones if there is none.

    `damping` is a share of the mean diagonal, raised tenfold up to 1 until there is one.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return None, None
    while damping <= 1:
        # the factorisation U U^T is the ordinary L L^T of the matrix with rows and columns reversed
        reversed_ = hessian.flip(0, 1)
        reversed_.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if not info and bool(lower.diagonal().isfinite().all()):
            return damping, lower.flip(0, 1)
        damping *= 10
    return None, None


def output_energy(hessian: Tensor, x: Tensor) -> Tensor:
    """x^T H x of every column of x (k, n): (n,)."""
    return (hessian @ x).mul_(x).sum(0)


def _descent(hessian: Tensor, damping: float) -> Tensor:
    """The feedback matrix of coordinate descent: column i is H[:, i] / H[i, i], zero at i."""
    diagonal = hessian.diagonal() + damping * hessian.diagonal().mean()
    feedback = hessian / diagonal
    feedback.fill_diagonal_(0)
    return feedback


def sweep(
    w: Tensor,
    feedback: Tensor,
    errors: Tensor,
    choose: Callable[[slice, Tensor, Tensor], None],
    *,
    triangular: bool,
) -> None:
    """Go through w (k, n) once, a block of rows at a time.

    `choose(rows, target, feedback)` replaces errors[rows]; target (b, n) is w[rows] + feedback[:, rows]^T
    errors, all of it that is known before the block, feedback (b, b) what is left to it: between blocks the
    product goes as one of matrices.
    """
    for start in range(0, w.shape[0], BLOCK):
        rows = slice(start, min(start + BLOCK, w.shape[0]))
        known = slice(0, start) if triangular else slice(None)
        target = torch.addmm(w[rows], feedback[known, rows].T, errors[known])
        choose(rows, target, feedback[rows, rows])


def _round_block(
    target: Tensor, w: Tensor, scale: Tensor, feedback: Tensor, errors: Tensor, bits: int
) -> Tensor:
    """Round the rows of one block; `target` (b, n) holds the feedback of all errors known before it."""
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
