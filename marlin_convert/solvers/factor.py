"""Hessians in the order in which their rows are solved, and the triangular factor of each.

The regression that makes up for drift and GPTQ's feedback are of one matrix, so it is factorised once.
"""

import torch
from torch import Tensor

# Elements that are put in another order, or turned, at once: large enough to be quick.
REORDERED, TURNED = 1 << 24, 1 << 22


class Factor:
    """Hessians (batch, k, k) in order of falling diagonal, in place, and U of each: H + damping = U U^T.

    So many rows stay `together`, by the sum of theirs. `damping` is the share of the mean diagonal that is
    added, raised as `factorise` says; `used` is what it took, `uppers` (batch, k, k) have their columns first
    in memory. `order` (batch, k) are the rows' numbers before.
    """

    def __init__(self, hessians: Tensor, damping: float, *, together: int = 1):
        self.hessians, self.damping = hessians, damping
        sums = diagonals(hessians).unflatten(1, (-1, together)).sum(2)
        first = torch.argsort(sums, descending=True, stable=True)[..., None] * together
        self.order = (first + torch.arange(together, device=first.device)).flatten(1)
        _reorder(hessians, self.order)
        self.used, self.uppers = factorise(hessians, damping)

    def give_up_uppers(self) -> Tensor:
        """The triangles, to be changed in place: they are known no more."""
        uppers = self.uppers
        del self.uppers
        return uppers

    def ordered(self, rows: Tensor) -> Tensor:
        """A copy of rows (batch, k, ...) in this order."""
        return rows[self._each, self.order]

    def natural(self, rows: Tensor) -> Tensor:
        """A copy of rows (batch, k, ...) of this order in the one they had before."""
        natural = torch.empty_like(rows)
        natural[self._each, self.order] = rows
        return natural

    def solve(self, right: Tensor) -> None:
        """Replace `right` (batch, n, k), in the rows' natural order, by right (H + damping)^-1, in place."""
        _reorder_columns(right, self.order)
        for upper, one in zip(self.uppers, right, strict=True):
            # one matrix after another: batched solvers are for small ones
            torch.linalg.solve_triangular(upper, one.T, upper=True, out=one.T)
            torch.linalg.solve_triangular(upper.T, one.T, upper=False, out=one.T)
        _reorder_columns(right, self.order.argsort())

    def restore(self) -> None:
        """Put the Hessians in the order they had before."""
        _reorder(self.hessians, self.order.argsort())

    @property
    def _each(self) -> Tensor:
        return torch.arange(len(self.order), device=self.order.device)[:, None]


def factorise(hessians: Tensor, damping: float) -> tuple[list[float | None], Tensor]:
    """Of each of `hessians` (batch, k, k) the damping used and U, upper triangular: H + damping = U U^T.

    `damping` is a share of the mean diagonal, raised tenfold up to 1 until there is a U; where there is none,
    None and the identity.
    """
    mean = diagonals(hessians).mean(-1)
    uppers = torch.empty_like(hessians).mT  # columns first, as LAPACK gives them
    used: list[float | None] = [None] * len(hessians)
    left = [number for number, alive in enumerate((mean > 0).tolist()) if alive]
    while left and damping <= 1:
        succeeded = []
        for number in left:  # the batched factorisation is one for small matrices
            # U U^T is the ordinary L L^T of the matrix with rows and columns turned round
            upper, info = uppers[number].copy_(hessians[number]), mean.new_empty((), dtype=torch.int32)
            _turn(upper)
            upper.diagonal().add_(damping * mean[number])
            torch.linalg.cholesky_ex(upper, out=(upper, info))
            _turn(upper)
            succeeded.append((info == 0) & upper.diagonal().isfinite().all())
        known = dict(zip(left, torch.stack(succeeded).tolist(), strict=True))
        used = [damping if known.get(number) else before for number, before in enumerate(used)]
        left = [number for number in left if not known[number]]
        damping *= 10
    for number, found in enumerate(used):
        if found is None:
            diagonals(uppers[number].zero_()).fill_(1)
    return used, uppers


def diagonals(matrices: Tensor) -> Tensor:
    """Views of the diagonals (..., k) of matrices (..., k, k)."""
    return matrices.diagonal(dim1=-2, dim2=-1)


def _reorder_columns(matrices: Tensor, order: Tensor) -> None:
    """Put the columns of each of `matrices` (batch, m, k) in its order (batch, k), in place."""
    batch, _, k = matrices.shape
    for lines in matrices.split(max(1, REORDERED // (batch * k)), 1):
        lines.copy_(lines.gather(2, order[:, None].expand(lines.shape)))


def _reorder(matrices: Tensor, order: Tensor) -> None:
    """Put rows and columns of each of `matrices` (batch, k, k) in its order (batch, k), in place."""
    _reorder_columns(matrices, order)
    _reorder_columns(matrices.mT, order)


def _turn(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a matrix (k, k), columns first in memory, in place."""
    elements = matrix.mT.view(-1)
    half = len(elements) // 2
    for start in range(0, half, TURNED):
        end = min(start + TURNED, half)
        front, back = elements[start:end], elements[len(elements) - end : len(elements) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
