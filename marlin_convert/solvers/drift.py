"""A weight that makes up for its inputs: what they have become in the quantized model, not what they were.

Where the blocks before have lost much, as pruned ones have, a linear's inputs x are no longer the original
model's x0. The weight V that gives x V^T closest to x0 W^T, the original output, is W + W C^T (H + d)^-1, C
the mean of x^T (x0 - x) and d the damping (asymmetric calibration: GPTAQ, arXiv 2504.02692). Solving for V in
place of W is all that is left to do: the rest of the error does not depend on what is solved for.
"""

import torch
from torch import Tensor

from marlin_convert.solvers.hessian import product

# How far to go from W to V, by measurement (benchmarks/RESULTS.md): V fits the calibration text.
SHARE = 0.75


class Drift:
    """Sums x^T (x0 - x), (k, k) float32: the inputs x of a linear, and x0 of the original model's."""

    def __init__(self, k: int, device: torch.device):
        self.sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor, original: Tensor) -> None:
        """Add the inputs x (..., k) and what they were."""
        x, original = x.reshape(-1, x.shape[-1]), original.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        # a CPU has no product of 16-bit tensors with a float32 result
        x, away = (t if t.is_cuda else t.float() for t in (x, original - x))
        self.sum += product(x.T, away)

    def mean(self) -> Tensor:
        """The mean over all tokens, (k, k) float32; the sum is given up."""
        return self.sum.div_(max(self.tokens, 1))


def compensated(weight: Tensor, hessian: Tensor, drift: Tensor, *, damping: float) -> Tensor:
    """`weight` (n, k) moved towards what gives the original outputs, (n, k) float32.

    hessian, drift (k, k): the means of x^T x and of x^T (x0 - x); `damping` is a share of the mean diagonal.
    """
    weight = weight.float()
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    if info:  # no inputs, or not finite sums: the weight as it is
        return weight
    return weight + SHARE * torch.cholesky_solve(drift @ weight.T, factor).T
