"""2:4 sparsity: of every quad, four consecutive inputs of one output, two weights are kept.

What `gptq` does for rows is done here for quads, and each is given the best of its six masks together with
its codes. With H = U D U^T in blocks of four, U unit block upper triangular, the error tr(E^T H E) is the sum
over the quads of d^T D_q d, d = e_q + (U^T e)_q of the quads before: the quads after it can take up
everything else. So a quad has a target, its weight moved by the feedback of earlier errors, and a metric D_q
(4, 4). This is SparseGPT (arXiv 2301.00774, section 3.3) with the saliency of a pair of weights in place of
the sum of two. Descent has the feedback matrix H_qq^-1 H and the metric H_qq: every quad gets its best mask
and codes given all others, and a mask may change for as long as that lowers the error.
"""

from itertools import combinations

import torch
from torch import Tensor

from marlin_convert.solvers.factor import Factor, diagonals
from marlin_convert.solvers.gptq import (
    Solution,
    feedback_precision,
    output_energy,
    round_to_codes,
    sweep,
)
from marlin_convert.solvers.scales import search_scales

QUAD = 4

# Elements of a matrix that are multiplied at once: large enough to be quick.
MULTIPLIED = 1 << 22

# The six masks of a quad: the positions kept, and those pruned.
KEPT = tuple(combinations(range(QUAD), 2))
PRUNED = tuple(reversed(KEPT))


def factor_quads(hessians: Tensor, damping: float) -> Factor:
    """The factor of Hessians (batch, k, k) that quads are solved with."""
    return Factor(hessians, damping, together=QUAD)


def choose_mask(weight: Tensor, hessian: Tensor, *, method: str) -> Tensor:
    """The weights to keep of `weight` (n, k), (k, n) bool, two in every quad, by a published rule.

    wanda: |w| ||x||, arXiv 2306.11695, section 3; magnitude: |w|.
    """
    saliency = weight.T.float().abs()
    if method == "wanda":
        saliency = saliency * hessian.diagonal().sqrt()[:, None]
    return _largest_pair(saliency)


def complete_mask(weight: Tensor) -> Tensor:
    """What a 2:4 sparse weight (n, k) keeps: (k, n) bool, its non-zeros, with zeros two in every quad."""
    kept = weight.T != 0
    mask = _largest_pair(kept.to(torch.float32))
    if (kept & ~mask).any():
        raise ValueError("a quad of the weight has more than two non-zeros")
    return mask


def _largest_pair(saliency: Tensor) -> Tensor:
    """The two largest of every quad of (k, n), of equals the first: (k, n) bool."""
    k, n = saliency.shape
    # a stable sort, because topk breaks ties differently on every device
    order = saliency.view(-1, QUAD, n).argsort(stable=True, dim=1, descending=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter_(1, order[:, :2], True).view(k, n)


def prune(
    weight: Tensor, factor: Factor, *, sweeps: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`weight` (n, k) pruned to 2:4, in its own type, and what is kept of it, (k, n) bool.

    Kept weights make up for the pruned ones. With a `mask` that one is kept; without, `sweeps` of descent
    refine it. The `factor` is that of one matrix, and gives up its triangle.
    """
    quads = _Quads(weight, factor, mask)
    quads.solve(None, sweeps)
    return quads.natural(quads.w - quads.errors).T.to(weight.dtype), quads.natural(quads.kept)


def solve(
    weight: Tensor,
    factor: Factor,
    *,
    bits: int,
    group_size: int,
    sweeps: int,
    positive: bool = False,
    mask: Tensor | None = None,
) -> Solution:
    """Mask, codes and scales for `weight` (n, k) at once, as `gptq.solve` finds codes and scales.

    k must be a multiple of four. A `mask` (k, n) bool, two in every quad, is kept as it is. Scales are
    searched on the weight pruned without rounding. The `factor` as for `prune`.
    """
    k = weight.shape[1]
    quads = _Quads(weight, factor, mask)
    quads.solve(None, sweeps=0)
    pruned = quads.natural(quads.w - quads.errors)
    scales = search_scales(pruned, quads.importance, group_size, bits, positive=positive)
    scale = scales[torch.arange(k, device=weight.device)[quads.order] // group_size]
    quads.solve(scale, sweeps, bits)
    # what is kept is code * scale up to rounding, so this finds the codes again
    codes = torch.round((quads.w - quads.errors) / scale).mul_(quads.kept) + 2 ** (bits - 1)
    return Solution(
        quads.natural(codes.to(torch.uint8)), scales.half(), quads.used, quads.natural(quads.kept)
    )


def bytes_beside(k: int, n: int) -> int:
    """Bytes that a weight (n, k) takes beside those of `gptq.bytes_taken` while it is solved for.

    The scale of every row, and what was pruned without rounding.
    """
    return 8 * k * n


class _Quads:
    """The quads of a weight, rows (k, n), in the order they are solved: that of falling diag(H)."""

    def __init__(self, weight: Tensor, factor: Factor, mask: Tensor | None):
        self._factor = factor
        (self.order,), (self.used,) = factor.order, factor.used
        (self._hessian,), (diagonal,) = factor.hessians, factor.natural(diagonals(factor.hessians))
        mean = diagonal.mean()
        self.importance = diagonal + factor.damping * mean if mean > 0 else torch.ones_like(diagonal)
        self.w = weight.T[self.order].float().contiguous()
        self.errors = torch.zeros_like(self.w)
        self.allowed = None if mask is None else mask[self.order]
        self.kept = torch.empty_like(self.w, dtype=torch.bool)
        # without a factorisation the largest are kept, and rounded to nearest
        (upper,) = factor.give_up_uppers()
        roots = _diagonal_quads(upper)
        self._metric = roots @ roots.mT
        self._feedback = _feedback(upper)

    def natural(self, rows: Tensor) -> Tensor:
        """Rows (k, n) in the order of the weight's inputs."""
        return self._factor.natural(rows[None])[0]

    def solve(self, scale: Tensor | None, sweeps: int, bits: int = 4) -> None:
        """Set `kept` and `errors`: of codes for the scales of the rows (k, n), or of weights not rounded.

        With `sweeps` nothing can be solved after it: what they need takes the place of the triangle.
        """
        self.errors.zero_()
        self._pass(self._feedback, self._metric, scale, bits, descent=False)
        if sweeps and self.used is not None:
            del self._feedback
            damped = self._hessian.clone()
            damped.diagonal().add_(self.used * damped.diagonal().mean())
            metric = _diagonal_quads(damped).clone()
            feedback = _feedback(damped)
            for _ in range(sweeps):
                self._pass(feedback, metric, scale, bits, descent=True)

    def _pass(
        self, feedback: Tensor, metric: Tensor, scale: Tensor | None, bits: int, *, descent: bool
    ) -> None:
        tables = _tables(metric)
        solve_block = _solve_block
        if self.w.is_cuda:
            # imported here because Triton exists only where there is a GPU
            from marlin_convert.solvers.sparsity_triton import solve_block

        def choose(rows: slice, target: Tensor, inside: Tensor) -> None:
            quads = slice(rows.start // QUAD, rows.stop // QUAD)
            solve_block(
                target[0],
                self.w[rows],
                None if scale is None else scale[rows],
                None if self.allowed is None else self.allowed[rows],
                inside[0],
                tables[quads],
                metric[quads] if descent else None,
                self.errors[rows],
                self.kept[rows],
                bits,
            )

        with feedback_precision(self.w.device):
            sweep(self.w[None], feedback[None], self.errors[None], choose, triangular=not descent)


def _diagonal_quads(matrix: Tensor) -> Tensor:
    """The blocks (quads, 4, 4) on the diagonal of a matrix (k, k)."""
    quads = len(matrix) // QUAD
    return matrix.view(quads, QUAD, quads, QUAD).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _feedback(matrix: Tensor) -> Tensor:
    """A matrix (k, k) times the inverse of its diagonal blocks, those left out (zero), in place."""
    inverses = torch.linalg.inv(_diagonal_quads(matrix))
    at_once = max(1, MULTIPLIED // (QUAD * len(matrix)))
    for some, inverse in zip(
        matrix.view(len(matrix), -1, QUAD).split(at_once, 1), inverses.split(at_once), strict=True
    ):
        some.copy_((some.transpose(0, 1) @ inverse).transpose(0, 1))
    _diagonal_quads(matrix).zero_()
    return matrix


def _tables(metric: Tensor) -> Tensor:
    """What a metric D (quads, 4, 4) says of a mask's pair kept, K, and pair pruned, P: (quads, 3, 6, 2, 2).

    D_KK^-1 D_KP, how the kept make up for the pruned; D_PP - D_PK D_KK^-1 D_KP, what the pruned cost even so;
    and D_KK, what rounding the kept costs.
    """
    kept, pruned = torch.tensor((KEPT, PRUNED), device=metric.device)
    inner = metric[:, kept[:, :, None], kept[:, None]]
    cross = metric[:, kept[:, :, None], pruned[:, None]]
    regression = torch.linalg.solve(inner, cross)
    left = metric[:, pruned[:, :, None], pruned[:, None]] - cross.mT @ regression
    return torch.stack((regression, left, inner), 1)


def _solve_block(
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
    """Give every quad of a block (b, n), in order, its best mask and values; sets `errors` and `kept`.

    `target` holds the feedback of all errors known before the block, `feedback` (b, b) that inside it.
    Without a `scale` values are not rounded; with `allowed` they are zero elsewhere; with a `metric` a quad
    stays as it is unless the best found is better, for a pair is rounded by a rule that can miss its best.
    """
    of_kept, of_pruned = torch.tensor((KEPT, PRUNED))
    changes = torch.empty_like(w)
    for i in range(0, len(w), QUAD):
        rows = slice(i, i + QUAD)
        goal = torch.addmm(target[rows], feedback[:i, rows].T, changes[:i])
        regression, left, inner = tables[i // QUAD, ..., None]
        pruned = goal[of_pruned]
        values = goal[of_kept] + (regression * pruned[:, None]).sum(2)
        cost = _quadratic(left, pruned)
        if scale is not None:
            best = values
            values = _round_pairs(best, scale[rows][of_kept], inner, bits)
            cost += _quadratic(inner, values - best)
        if allowed is not None:
            cost.masked_fill_(~allowed[rows][of_kept].all(1), torch.inf)
        mask = cost.argmin(0)
        positions = of_kept[mask].T
        keep = torch.zeros_like(kept[rows]).scatter_(0, positions, True)
        chosen = values.gather(0, mask.expand(1, 2, -1))[0]
        error = w[rows] - torch.zeros_like(goal).scatter_(0, positions, chosen)
        if metric is not None:
            off = w[rows] - errors[rows] - goal
            better = cost.amin(0) < output_energy(metric[i // QUAD], off)
            keep = torch.where(better, keep, kept[rows])
            error = torch.where(better, error, errors[rows])
        kept[rows] = keep
        torch.sub(error, errors[rows], out=changes[rows])
        errors[rows] = error


def _quadratic(matrix: Tensor, x: Tensor) -> Tensor:
    """x^T M x of pairs x (6, 2, n), M (6, 2, 2, 1): (6, n)."""
    return (
        matrix[:, 0, 0] * x[:, 0] ** 2
        + 2 * matrix[:, 0, 1] * x[:, 0] * x[:, 1]
        + matrix[:, 1, 1] * x[:, 1] ** 2
    )


def _round_pairs(best: Tensor, scale: Tensor, inner: Tensor, bits: int) -> Tensor:
    """Codes times scales near pairs (6, 2, n): first the first rounded, then the second."""
    values = torch.empty_like(best)
    values[:, 0] = round_to_codes(best[:, 0], scale[:, 0], bits) * scale[:, 0]
    second = best[:, 1] + inner[:, 0, 1] / inner[:, 1, 1] * (best[:, 0] - values[:, 0])
    values[:, 1] = round_to_codes(second, scale[:, 1], bits) * scale[:, 1]
    return values
