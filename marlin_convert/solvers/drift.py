"""A weight that makes up for its inputs: what they have become in the quantized model, not what they were.

The inputs x of a linear are no longer the original model's x0, and what its output is added to is no longer
what it was. The weight V wanted gives the original outputs y0 from the inputs there are: it is the ridge
regression (H + d)^-1 (x^T y0 + d W), H the mean of x^T x, which falls back on W where the text says nothing
(asymmetric calibration: GPTAQ, arXiv 2504.02692). Solving for V in place of W is all that is left to do: the
rest of the error does not depend on what is solved for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marlin_convert.solvers.factor import Factor, diagonals
from marlin_convert.solvers.hessian import bf16_products, product

# How far to go from W to V, by measurement (benchmarks/RESULTS.md): V fits the calibration text, and fits it
# too well where there are few tokens for each of its inputs.
SHARE = 0.75
OVERFIT = 16
# And how far at most for one output, as a share of the norm of its weights: where tokens go to other experts
# than in the original, the residual has drifted beyond what an output is there to make up for. Of SmolLM2's
# outputs 5 in 10,000 go further than 0.25.
MOST = 0.4


class Products:
    """Sums x^T y, (k, n) float32, over all inputs x of a linear and what is wanted of them, y.

    `bf16_units` says that the CPU has some.
    """

    def __init__(self, k: int, n: int, device: torch.device, *, bf16_units: bool = False):
        self._bf16_units = bf16_units
        self.sum = torch.zeros(k, n, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the inputs x (..., k) and y (..., n), of one type."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        self.tokens += len(x)
        with bf16_products(x.dtype == torch.bfloat16 and self._bf16_units):
            # a CPU has no product of 16-bit tensors with a float32 result
            x, y = (t if t.is_cuda else t.float() for t in (x, y))
            self.sum += product(x.T, y)

    def mean(self) -> Tensor:
        """The mean over all tokens, (k, n) float32; the sum is given up."""
        return self.sum.div_(max(self.tokens, 1))


def compensated(
    weights: Tensor,
    factor: Factor,
    wanted: Tensor,
    *,
    tokens: Sequence[int],
    most: float | None = MOST,
) -> Tensor:
    """Every one of `weights` (batch, n, k) moved towards what gives the original outputs, in float32.

    `factor` is of the means of x^T x, wanted (batch, k, n) that of x^T y0, over so many tokens. No output is
    moved further than `most` of its norm.
    """
    weights, used = weights.float(), factor.used
    shares = [SHARE / (1 + OVERFIT * weights.shape[2] / count) for count in tokens]
    ridges = [share or 0.0 for share in used]
    share, ridge = torch.tensor([shares, ridges], device=weights.device)[..., None, None]
    ridge = ridge * diagonals(factor.hessians).mean(-1)[:, None, None]
    moved = torch.addcmul(wanted.mT, weights, ridge, out=torch.empty_like(weights))
    factor.solve(moved)
    moved.sub_(weights).mul_(share)
    if most is not None:
        far = moved.norm(dim=2, keepdim=True) / weights.norm(dim=2, keepdim=True).mul_(most)
        moved.div_(far.nan_to_num_(1.0).clamp_(min=1.0))
    for number, one in enumerate(used):
        if one is None:  # no inputs, or sums that are not finite: the solver rounds, and says so
            moved[number] = 0
    return moved.add_(weights)


def before_norm(norm: nn.Module, y: Tensor, change: Tensor) -> Tensor:
    """The change of y (..., n) that changes norm(y) by `change`, to first order, in float32.

    `norm` divides by the root of the mean square and multiplies by a weight: one output for each of its
    inputs, whose lengths are lost, so that along y nothing could be changed. Of a norm that takes the mean
    off its inputs the ones that tell its weight leave nothing, and so does this.
    """
    weight = norm(torch.ones_like(y[..., :1, :])).float()
    length = y.float().pow(2).mean(-1, keepdim=True).sqrt()
    return torch.where(weight == 0, 0.0, change * length / weight)
