"""The solver against slow references written from the papers, and where its inputs are degenerate."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marlin_convert.solvers.drift import before_norm, compensated
from marlin_convert.solvers.factor import Factor, factorise
from marlin_convert.solvers.gptq import Solution, bytes_taken, solve, solve_batch
from marlin_convert.solvers.hessian import Hessian
from marlin_convert.solvers.scales import search_scales

K, N = 256, 64


def problem(k: int = K, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (n, k) and the Hessian (k, k) of correlated inputs, some of them much larger than others."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=random) @ torch.randn(k, k, generator=random) / k**0.5
    x *= torch.rand(k, generator=random) ** 2 * 3 + 0.05
    x += torch.randn(4 * k, 1, generator=random)
    return torch.randn(n, k, generator=random), x.T @ x / len(x)


def dequantized(found: Solution, group_size: int) -> Tensor:
    """(k, n) float64."""
    return (found.codes.double() - 8) * found.scales.double().repeat_interleave(group_size, 0)


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))


def objective(found: Solution, weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """e^T H e of every output, float64."""
    error = weight.double().T - dequantized(found, group_size)
    return ((hessian.double() @ error) * error).sum(0)


def nearest(weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Codes (k, n) rounded to nearest."""
    scale = scales.float().repeat_interleave(group_size, 0)
    return (torch.round(weight.float().T / scale).clamp(-8, 7) + 8).to(torch.uint8)


def classic_gptq(weight: Tensor, hessian: Tensor, scales: Tensor, group_size: int, damping: float) -> Tensor:
    """GPTQ as in arXiv 2210.17323: the inverse's Cholesky factor, columns updated one after another."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w = weight.double().T[order].clone()
    scale = scales.double().repeat_interleave(group_size, 0)[order]
    inverse = torch.linalg.inv(damped(hessian, damping)[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(w)
    for i in range(len(w)):
        codes[i] = torch.round(w[i] / scale[i]).clamp(-8, 7)
        error = (w[i] - codes[i] * scale[i]) / upper[i, i]
        w[i + 1 :] -= upper[i, i + 1 :, None] * error
    stored = torch.empty(w.shape, dtype=torch.uint8)
    stored[order] = (codes + 8).to(torch.uint8)
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [64, 640, 1100])
def test_the_hessian_is_the_mean_of_outer_products(k: int, dtype: torch.dtype) -> None:
    batches = [torch.randn(2, 33, k).to(dtype), torch.randn(5, 7, k).to(dtype)]
    hessian = Hessian(k, torch.device("cpu"))
    for x in batches:
        hessian.add(x)
    flat = torch.cat([x.reshape(-1, k) for x in batches]).double()
    mean = hessian.mean()
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.T)
    torch.testing.assert_close(mean.double(), flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)


def test_the_hessian_restores_the_matmul_precision() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    Hessian(64, torch.device("cpu")).add(torch.randn(8, 64).bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("group_size", [32, 64, 128, K])
@pytest.mark.parametrize("k", [K, 2 * K])
def test_the_codes_are_those_of_the_classic_algorithm(k: int, group_size: int) -> None:
    weight, hessian = problem(k, seed=group_size)
    found = solve(weight, hessian, bits=4, group_size=group_size, damping=0.05, sweeps=0)
    assert found.damping == 0.05
    expected = classic_gptq(weight, hessian, found.scales, group_size, 0.05)
    assert (found.codes == expected).double().mean() >= 0.999


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("group_size", [32, 64, 128, K])
def test_the_error_is_below_that_of_rounding_to_nearest(group_size: int, sweeps: int) -> None:
    weight, hessian = problem(seed=group_size)
    found = solve(weight, hessian, bits=4, group_size=group_size, damping=0.05, sweeps=sweeps)
    rounded = Solution(nearest(weight, found.scales, group_size), found.scales, None)
    ours = objective(found, weight, hessian, group_size)
    theirs = objective(rounded, weight, hessian, group_size)
    assert ours.sum() < 0.6 * theirs.sum()
    assert (ours < theirs).double().mean() > 0.95


@pytest.mark.parametrize("group_size", [64, K])
@pytest.mark.parametrize("seed", range(3))
def test_coordinate_descent_never_raises_the_error(group_size: int, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    before = torch.full((N,), torch.inf, dtype=torch.float64)
    for sweeps in range(5):
        found = solve(weight, hessian, bits=4, group_size=group_size, damping=0.05, sweeps=sweeps)
        after = objective(found, weight, damped(hessian, 0.05), group_size)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    weight, hessian = problem(64, 8)
    found = solve(weight, hessian, bits=4, group_size=64, damping=0.05, sweeps=50)
    full = damped(hessian, 0.05)
    best = objective(found, weight, full, 64)
    for row in range(64):
        for step in (-1, 1):
            codes = found.codes.clone().to(torch.int16)
            codes[row] = (codes[row] + step).clamp(0, 15)
            moved = Solution(codes.to(torch.uint8), found.scales, None)
            assert (objective(moved, weight, full, 64) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("sweeps", [0, 2])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nothing(sweeps: int) -> None:
    weight, hessian = problem()
    dead = torch.arange(0, K, 7)
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=sweeps)
    assert found.damping == 0.05
    assert torch.equal(found.codes[dead], nearest(weight, found.scales, 128)[dead])
    rounded = Solution(nearest(weight, found.scales, 128), found.scales, None)
    assert objective(found, weight, hessian, 128).sum() < 0.6 * objective(rounded, weight, hessian, 128).sum()
    # what the dead inputs hold reaches the others by the groups' scales alone
    other = weight.clone()
    other[:, dead] *= 0.5
    again = solve(other, hessian, bits=4, group_size=128, damping=0.05, sweeps=sweeps)
    same = (again.scales == found.scales).all(0)
    assert same.any()
    alive = torch.ones(K, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(again.codes[alive][:, same], found.codes[alive][:, same])


def test_without_any_input_weights_are_rounded_to_nearest_and_it_is_said() -> None:
    weight, _ = problem()
    found = solve(weight, torch.zeros(K, K), bits=4, group_size=128, damping=0.05, sweeps=2)
    assert found.damping is None
    assert torch.equal(found.codes, nearest(weight, found.scales, 128))


def indefinite(depth: float) -> Tensor:
    """A Hessian with mean diagonal 1 and lowest eigenvalue -depth."""
    basis = torch.linalg.qr(torch.randn(K, K, generator=torch.Generator().manual_seed(1)).double())[0]
    values = torch.rand(K, generator=torch.Generator().manual_seed(2)).double()
    values[0] = 0
    values *= (K + depth) / values.sum()
    values[0] = -depth
    hessian = (basis * values) @ basis.T
    return ((hessian + hessian.T) / 2).float()


def test_damping_is_raised_until_the_hessian_can_be_factorised() -> None:
    weight, _ = problem()
    assert solve(weight, indefinite(0.02), bits=4, group_size=128, damping=0.05, sweeps=2).damping == 0.05
    found = solve(weight, indefinite(0.3), bits=4, group_size=128, damping=0.05, sweeps=2)
    assert found.damping == 0.5
    expected = classic_gptq(weight, indefinite(0.3), found.scales, 128, 0.5)
    first = solve(weight, indefinite(0.3), bits=4, group_size=128, damping=0.05, sweeps=0)
    assert (first.codes == expected).double().mean() > 0.999


def test_what_no_damping_mends_is_rounded_to_nearest_and_said() -> None:
    weight, _ = problem()
    found = solve(weight, indefinite(3.0), bits=4, group_size=128, damping=0.05, sweeps=2)
    assert found.damping is None
    assert torch.equal(found.codes, nearest(weight, found.scales, 128))


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e5])
def test_scales_are_float16_numbers_other_than_zero(size: float) -> None:
    weight, hessian = problem()
    weight = weight * size
    weight[3] = 0
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=1)
    assert found.scales.dtype == torch.float16
    assert found.scales.isfinite().all() and found.scales.all()
    assert (found.codes[:, 3] == 8).all()
    if size >= 1e-3:
        difference = dequantized(found, 128) - weight.double().T
        assert difference.norm() < 0.2 * weight.norm()


def test_weights_too_large_for_any_float16_scale_do_not_get_one() -> None:
    weight, hessian = problem()
    weight[5] *= 1e8
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=1)
    assert not found.scales[:, 5].isfinite().any()
    others = [n for n in range(N) if n != 5]
    assert found.scales[:, others].isfinite().all()


def test_scales_take_the_sign_of_the_longer_side() -> None:
    weight = torch.full((2, 128), 0.01)
    weight[0, 5], weight[1, 5] = 4.0, -4.0
    scales = search_scales(weight.T.contiguous(), torch.ones(128), 128, 4)
    assert scales[0, 0] < 0 < scales[0, 1]
    weight, hessian = problem()
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=1)
    assert (found.scales < 0).any() and (found.scales > 0).any()


def test_positive_scales_hold_both_sides() -> None:
    weight = torch.full((2, 128), 1e-3)
    weight[0, 5], weight[1, 5] = 4.0, -4.0
    scales = search_scales(weight.T.contiguous(), torch.ones(128), 128, 4, positive=True)
    torch.testing.assert_close(scales, torch.tensor([[4 / 7, 4 / 8]]), rtol=0.03, atol=0)
    weight, hessian = problem()
    settings = {"bits": 4, "group_size": 128, "damping": 0.05, "sweeps": 1}
    signed, positive = (solve(weight, hessian, positive=one, **settings) for one in (False, True))
    assert (positive.scales > 0).all()
    error, of_positive = (objective(one, weight, hessian, 128).sum() for one in (signed, positive))
    assert error < of_positive < 1.2 * error


def test_the_scale_search_is_never_worse_than_the_plain_scale() -> None:
    weight, hessian = problem()
    wt, importance = weight.T.contiguous(), hessian.diagonal()
    scales = search_scales(wt, importance, 128, 4)

    def error(scales: Tensor) -> Tensor:
        full = scales.repeat_interleave(128, 0)
        rounded = torch.round(wt / full).clamp(-8, 7) * full
        return ((rounded - wt).abs() ** 2.4 * importance[:, None]).view(2, 128, N).sum(1)

    plain = wt.view(2, 128, N).abs().amax(1) / 7.5
    assert error(scales).sum() < error(plain.half().float()).sum()


def searched(weight: Tensor, importance: Tensor, group_size: int) -> Tensor:
    """Scales (groups, n) of the least weighed error |code * scale - w| ** 2.4, one column after another."""
    found = []
    for group, weighed in zip(weight.T.split(group_size), importance.split(group_size), strict=True):
        for column in group.T:
            extreme = column[column.abs().argmax()]
            best = (float("inf"), 0.0)
            for step in range(14):
                scale = (extreme * ((1.10 - 0.03 * step) / -8)).half().float()
                away = ((column / scale).round().clamp(-8, 7) * scale - column).abs() ** 2.4
                best = min(best, ((away * weighed).sum().item(), scale.item()))
            found.append(best[1])
    return torch.tensor(found).view(-1, len(weight))


def test_scales_are_searched_with_the_damped_diagonal_of_the_hessian() -> None:
    weight, hessian = problem(128, 24)
    diagonal = hessian.diagonal()
    found = solve(weight, hessian, bits=4, group_size=32, damping=0.3, sweeps=0)
    damped_diagonal = diagonal + 0.3 * diagonal.mean()
    assert (found.scales == searched(weight, damped_diagonal, 32)).float().mean() > 0.98
    for other in (torch.ones(128), diagonal):
        assert (found.scales == searched(weight, other, 32)).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_solved_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    weight, hessian = problem()
    half = weight.to(dtype)
    one = solve(half, hessian, bits=4, group_size=128, damping=0.05, sweeps=2)
    other = solve(half.float(), hessian, bits=4, group_size=128, damping=0.05, sweeps=2)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def test_the_same_problem_has_the_same_solution() -> None:
    weight, hessian = problem()
    kept = weight.clone(), hessian.clone()
    one, other = (solve(weight, hessian, bits=4, group_size=64, damping=0.05, sweeps=2) for _ in range(2))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_linears_solved_side_by_side_are_as_solved_alone() -> None:
    """The linears of a stage are solved as one matrix."""
    weight, hessian = problem(n=96)
    together = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=2)
    for part in (slice(0, 64), slice(64, 96)):
        alone = solve(weight[part], hessian, bits=4, group_size=128, damping=0.05, sweeps=2)
        assert torch.equal(alone.scales, together.scales[:, part])
        assert (alone.codes == together.codes[:, part]).double().mean() > 0.999


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_batch_has_the_solutions_of_each(sweeps: int, positive: bool) -> None:
    """Bit for bit, whatever the others are: one that needs more damping, one that none mends, one unread."""
    weights, hessians = (torch.stack(many) for many in zip(*(problem(seed=i) for i in range(6)), strict=True))
    hessians[1], hessians[2], hessians[4] = indefinite(0.3), 0, indefinite(3.0)
    settings = {"bits": 4, "group_size": 64, "sweeps": sweeps, "positive": positive}
    kept = weights.clone(), hessians.clone()
    factor = Factor(hessians, 0.05)
    found = solve_batch(weights, factor, **settings)
    factor.restore()
    assert torch.equal(weights, kept[0]) and torch.equal(hessians, kept[1])
    assert [one.damping for one in found] == [0.05, 0.5, None, 0.05, None, 0.05]
    for one, weight, hessian in zip(found, weights, hessians, strict=True):
        alone = solve(weight, hessian, damping=0.05, **settings)
        for name in ("codes", "scales"):
            assert torch.equal(getattr(one, name), getattr(alone, name)), name
    for number in (2, 4):
        assert torch.equal(found[number].codes, nearest(weights[number], found[number].scales, 64))


def test_every_factor_of_a_batch_is_that_of_its_matrix() -> None:
    hessians = torch.stack([indefinite(0.3), problem()[1], indefinite(3.0), torch.full((K, K), torch.nan)])
    used, uppers = factorise(hessians, 0.05)
    assert used == [0.5, 0.05, None, None]
    for number in (0, 1):
        upper = uppers[number].double()
        assert torch.equal(upper, upper.triu())
        torch.testing.assert_close(
            upper @ upper.T, damped(hessians[number], used[number] or 0), rtol=1e-4, atol=1e-4
        )
    assert all(torch.equal(uppers[number], torch.eye(K)) for number in (2, 3))


def test_every_weight_of_a_batch_is_moved_as_alone() -> None:
    weights, hessians = (torch.stack(many) for many in zip(*(problem(seed=i) for i in range(4)), strict=True))
    wanted = hessians @ (weights + 0.1 * torch.randn(weights.shape)).mT
    hessians[1], hessians[2] = 0, torch.nan
    tokens = [4 * K, 10, 10, 100 * K]
    moved = compensated(weights, Factor(hessians.clone(), 0.05), wanted, tokens=tokens)
    for number, count in enumerate(tokens):
        one = slice(number, number + 1)
        factor = Factor(hessians[one].clone(), 0.05)
        alone = compensated(weights[one], factor, wanted[one], tokens=[count])
        assert torch.equal(moved[one], alone)
        assert torch.equal(moved[number], weights[number]) == (number in (1, 2))


class Peak(TorchDispatchMode):
    """The most bytes at one time of the tensors that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given, new = (
            [one.untyped_storage() for one in tree_leaves(tensors) if isinstance(one, Tensor)]
            for tensors in ((args, kwargs), made)
        )
        for storage in new:
            if storage._cdata not in self._held.keys() | {one._cdata for one in given}:
                self._held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._held.pop, storage._cdata, None)
        self.most = max(self.most, sum(self._held.values()))
        return made


def test_the_bytes_that_a_weight_of_a_batch_takes() -> None:
    """Counted from the sums of its inputs on: how many fit into memory is reckoned with them."""
    batch, k, n = 6, 1024, 256
    x, weights = torch.randn(batch, 2 * k, k), torch.randn(batch, n, k)
    with Peak() as peak:
        hessians, products = (x.mT @ x / len(x[0]) for _ in range(2))
        factor = Factor(hessians, 0.05)
        targets = compensated(weights, factor, products @ weights.mT, tokens=[2 * k] * batch)
        solve_batch(targets, factor, bits=4, group_size=128, sweeps=1)
    assert 0.8 < peak.most / (batch * bytes_taken(k, n)) < 1.05


class RMSNorm(torch.nn.RMSNorm):
    """Gemma's: the weight says how far from 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


def test_a_change_before_a_norm_makes_the_one_that_is_wanted_after_it() -> None:
    """By its derivative, but for what would only make y longer; where the weight is 0 none is asked."""
    torch.manual_seed(0)
    norm, y, change = RMSNorm(64), torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    norm.weight.data = torch.randn(64)
    norm.weight.data[7] = -1
    change[..., 7] = 0
    got = before_norm(norm, y, change)
    assert (got[..., 7] == 0).all()
    _, made = torch.func.jvp(norm, (y,), (got,))
    z = norm(y)
    lost = z * (y * got).mean(-1, keepdim=True) / y.pow(2).mean(-1, keepdim=True)
    torch.testing.assert_close(made, change - lost, rtol=1e-4, atol=1e-4)


def test_before_a_norm_that_takes_the_mean_off_nothing_is_asked() -> None:
    norm = torch.nn.LayerNorm(64, bias=False)
    assert (before_norm(norm, torch.randn(2, 4, 64), torch.randn(2, 4, 64)) == 0).all()
