"""What the solver needs of a calibration text: what the inputs of a stage sum up to, over all of it."""

from functools import cached_property

from torch import Tensor

from marlin_convert.models.stages import Reached
from marlin_convert.ranks import Share
from marlin_convert.solvers.drift import Products, before_norm
from marlin_convert.solvers.hessian import Hessian


class Sums:
    """What the inputs of a stage sum up to and, beside the original model, what is wanted of them.

    That is the original's outputs; where outputs are added to a residual, the original's sums, so that the
    drift of the residual is made up for too.
    """

    def __init__(self, bias: Tensor | None):
        self._bias = bias
        self._hessian: Hessian | None = None
        self._products: Products | None = None
        self._of_outputs = False
        self.tokens = 0
        self.routed: int | None = None

    def add(self, one: Reached, before: Reached | None, *, bf16_units: bool) -> None:
        """Add what a micro-batch brings to the stage, in the model that is made and in the original."""
        x = one.x
        self.tokens += x.shape[:-1].numel()
        if one.routed is not None:
            self.routed = (self.routed or 0) + one.routed
        if self._hessian is None:
            self._hessian = Hessian(x.shape[-1], x.device, bf16_units=bf16_units)
        self._hessian.add(x)
        if before is None:
            return
        wanted = before.x
        if one.residual is not None and before.residual is not None and before.output is not None:
            drift = before.residual.float() - one.residual.float()
            if before.norm is not None:
                drift = before_norm(before.norm, before.output, drift)
            wanted = before.output + (drift if self._bias is None else drift - self._bias)
            self._of_outputs = True
        if self._products is None:
            self._products = Products(x.shape[-1], wanted.shape[-1], x.device, bf16_units=bf16_units)
        self._products.add(x, wanted.to(x.dtype))

    def of_all(self, tokens: int) -> list[Tensor]:
        """The sums, to be made those of all ranks in place: these had so many tokens."""
        self.tokens = tokens
        summed = [one for one in (self._hessian, self._products) if one is not None]
        for one in summed:
            one.tokens = tokens
        return [one.sum for one in summed]

    def hessian(self) -> Tensor:
        """The mean of x^T x, (k, k) float32; the sum is given up."""
        summed, self._hessian = self._hessian, None
        assert summed is not None
        return summed.mean()

    @cached_property
    def _mean(self) -> Tensor | None:
        products, self._products = self._products, None
        return None if products is None else products.mean()

    def wanted(self, weight: Tensor, share: Share) -> Tensor | None:
        """The mean of x^T y0, (k, n) float32, for a share of the outputs; None if it is not known.

        `weight` (n, k) is the original's of these outputs. Where outputs are added to a residual they are of
        one linear, which asks once: what they sum up to is given up.
        """
        if self._of_outputs:
            assert self._products is not None
            products, self._products = self._products, None
            return products.mean()[:, share.slice(products.sum.shape[1])]
        return None if self._mean is None else self._mean @ weight.T.float()
