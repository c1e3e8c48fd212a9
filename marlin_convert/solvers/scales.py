"""The search for one scale per group of weights, before their codes are chosen."""

import torch
from torch import Tensor

# Candidates as fractions of the scale that maps a group's extreme weight to the lowest code, and the norm
# of the error: both chosen by measurement, see benchmarks/RESULTS.md.
FRACTIONS = tuple(1.10 - 0.03 * step for step in range(14))
NORM = 2.4

# No scale is nearer to zero: a subnormal one would lose bits, and kernels may flush it.
SMALLEST = torch.finfo(torch.float16).smallest_normal


def search_scales(
    weight: Tensor, importance: Tensor, group_size: int, bits: int, *, positive: bool = False
) -> Tensor:
    """The scale of every group, (..., groups, n) float32 of values that float16 holds.

    weight (..., k, n) float32; importance (..., k) weighs the rounding error of each row, in GPTQ the
    Hessian's diagonal. The codes' range is lopsided (-8 .. 7), so a scale takes the sign that puts the weight
    of largest magnitude on the long side; a `positive` one is wide enough for the weights on either side. A
    group too large for any float16 scale gets infinity.
    """
    if weight.is_cuda:
        # imported here because Triton exists only where there is a GPU
        from marlin_convert.solvers import scales_triton

        return scales_triton.search_scales(
            weight, importance, group_size, bits,
            positive=positive, candidates=FRACTIONS, norm=NORM, smallest=SMALLEST,
        )  # fmt: skip
    *batch, k, n = weight.shape
    low = -(2 ** (bits - 1))
    high = -low - 1
    scales = torch.full((*batch, k // group_size, n), torch.inf, device=weight.device)
    for g in range(k // group_size):
        rows = slice(g * group_size, (g + 1) * group_size)
        w, d = weight[..., rows, :], importance[..., rows, None]
        least, most = w.aminmax(dim=-2)
        if positive:
            widest = torch.maximum(least / low, most / high)
        else:
            widest = torch.where(most > -least, most, least) / low
        best_error = torch.full((*batch, n), torch.inf, device=weight.device)
        best = scales[..., g, :]
        for fraction in FRACTIONS:
            scale = widest * fraction
            scale = torch.where(scale.abs() < SMALLEST, SMALLEST, scale).half().float()
            error = torch.round(w / scale[..., None, :]).clamp_(low, high).mul_(scale[..., None, :]).sub_(w)
            error = error.abs_().pow_(NORM).mul_(d).sum(-2)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best.copy_(torch.where(better, scale, best))
    return scales
