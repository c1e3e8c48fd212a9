"""2:4 sparsity against brute force on small problems, and what must hold of every solution."""

from itertools import combinations, product
from typing import Any

import pytest
import torch
from test_solvers import K, N, Peak, damped, indefinite, nearest, objective, problem
from torch import Tensor

from marlin_convert.solvers import factor as factors
from marlin_convert.solvers import gptq, sparsity
from marlin_convert.solvers.drift import SHARE, Products, compensated
from marlin_convert.solvers.factor import Factor
from marlin_convert.solvers.hessian import Hessian
from marlin_convert.solvers.sparsity import complete_mask

MASKS = [torch.tensor([i in kept for i in range(4)]) for kept in combinations(range(4), 2)]
METHODS = ["sparsegpt", "wanda", "magnitude"]


def factor_of(hessian: Tensor, damping: float) -> Factor:
    """That of one Hessian, which stays as it is."""
    return sparsity.factor_quads(hessian[None].clone(), damping)


def solve(weight: Tensor, hessian: Tensor, *, damping: float, **settings: Any) -> gptq.Solution:
    return sparsity.solve(weight, factor_of(hessian, damping), **settings)


def prune(weight: Tensor, hessian: Tensor, *, damping: float, **settings: Any) -> tuple[Tensor, Tensor]:
    return sparsity.prune(weight, factor_of(hessian, damping), **settings)


def choose_mask(weight: Tensor, hessian: Tensor, *, method: str) -> Tensor:
    """By any of METHODS."""
    if method == "sparsegpt":
        return prune(weight, hessian, damping=0.05, sweeps=0)[1]
    return sparsity.choose_mask(weight, hessian, method=method)


def kept_of_every_quad(mask: Tensor) -> Tensor:
    return mask.view(-1, 4, mask.shape[1]).sum(1)


def random_mask(k: int, n: int) -> Tensor:
    drawn = torch.randint(6, (k // 4, n), generator=torch.Generator().manual_seed(5))
    return torch.stack(MASKS)[drawn].transpose(1, 2).reshape(k, n)


def best_values(weight: Tensor, hessian: Tensor, fixed: Tensor, free: Tensor) -> tuple[float, Tensor]:
    """The least e^T H e, float64, of one output's errors (k,) with those not free fixed; and the errors."""
    errors = fixed.clone()
    errors[free] = 0
    errors[free] = -torch.linalg.solve(hessian[free][:, free], (hessian @ errors)[free])
    return (errors @ hessian @ errors).item(), errors


def slow_sparsegpt(weight: Tensor, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Each quad in turn gets the mask that costs least once all that is not decided has made up for it.

    By trying all six, every time with a least squares problem of its own: weight (k, n), mask (k, n).
    """
    k, n = weight.shape
    full = damped(hessian, damping)
    order = hessian.diagonal().view(-1, 4).sum(1).argsort(descending=True, stable=True).tolist()
    pruned, kept = weight.double().clone(), torch.zeros(k, n, dtype=torch.bool)
    for column in range(n):
        errors = torch.zeros(k, dtype=torch.float64)
        undecided = torch.ones(k, dtype=torch.bool)
        for quad in order:
            rows = slice(4 * quad, 4 * quad + 4)
            tried = []
            for mask in MASKS:
                free, fixed = undecided.clone(), errors.clone()
                free[rows] = mask
                fixed[rows] = torch.where(mask, 0, weight[rows, column].double())
                tried.append((*best_values(weight[:, column], full, fixed, free), mask))
            _, found, mask = min(tried, key=lambda one: one[0])
            errors[rows], kept[rows, column] = found[rows], mask
            undecided[rows] = False
        pruned[:, column] -= errors
    return pruned, kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(2))
def test_masks_keep_two_of_every_quad(method: str, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    weight[3] = 0
    weight[4, ::2] = 0
    mask = choose_mask(weight, hessian, method=method)
    assert mask.dtype == torch.bool and mask.shape == (K, N)
    assert (kept_of_every_quad(mask) == 2).all()


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_wanda_and_magnitude_keep_what_they_say(method: str) -> None:
    weight, hessian = problem(64, 16)
    mask = choose_mask(weight, hessian, method=method)
    norms = hessian.diagonal().sqrt() if method == "wanda" else torch.ones(64)
    for n, quad in product(range(16), range(16)):
        saliency = [abs(weight[n, 4 * quad + i].item()) * norms[4 * quad + i].item() for i in range(4)]
        largest = sorted(range(4), key=lambda i: -saliency[i])[:2]
        assert mask[4 * quad : 4 * quad + 4, n].nonzero()[:, 0].tolist() == sorted(largest)


@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_the_best_of_six_masks_for_every_quad(seed: int) -> None:
    weight, hessian = problem(24, 12, seed)
    pruned, mask = prune(weight, hessian, damping=0.05, sweeps=0)
    expected, kept = slow_sparsegpt(weight.T, hessian, 0.05)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(pruned.T.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(choose_mask(weight, hessian, method="sparsegpt"), mask)


def test_descent_ends_where_no_quad_has_a_better_mask() -> None:
    weight, hessian = problem(32, 6)
    pruned, mask = prune(weight, hessian, damping=0.05, sweeps=200)
    full = damped(hessian, 0.05)
    for column in range(6):
        errors = (weight[column] - pruned[column]).double()
        error = (errors @ full @ errors).item()
        for quad, other in product(range(8), MASKS):
            rows, free, fixed = (
                slice(4 * quad, 4 * quad + 4),
                torch.zeros(32, dtype=torch.bool),
                errors.clone(),
            )
            free[rows] = other
            fixed[rows] = weight[column, rows].double()
            assert best_values(weight[column], full, fixed, free)[0] >= error * (1 - 1e-4)
        # and the kept weights are the least squares solution under the mask
        least = best_values(weight[column], full, weight[column].double(), mask[:, column])[0]
        assert error <= least * (1 + 1e-3)


@pytest.mark.parametrize("sweeps", [0, 3])
def test_a_single_quad_is_solved_as_well_as_by_trying_everything(sweeps: int) -> None:
    weight, hessian = problem(4, 64)
    found = solve(weight, hessian, bits=4, group_size=4, damping=0.05, sweeps=sweeps)
    full = damped(hessian, 0.05)
    ours = objective(found, weight, full, 4)
    codes = torch.cartesian_prod(torch.arange(-8.0, 8), torch.arange(-8.0, 8)).double()
    best = torch.full((64,), torch.inf, dtype=torch.float64)
    for mask in MASKS:
        values = torch.zeros(len(codes), 4, dtype=torch.float64)
        values[:, mask] = codes
        errors = weight.double()[:, None] - values * found.scales[0].double()[:, None, None]
        best = torch.minimum(best, torch.einsum("nci,ij,ncj->nc", errors, full, errors).amin(1))
    assert (ours >= best * (1 - 1e-6)).all()
    assert ours.sum() < 1.01 * best.sum()


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("group_size", [32, 64, 128, K])
def test_a_solution_is_sparse(group_size: int, sweeps: int) -> None:
    weight, hessian = problem(seed=group_size)
    found = solve(weight, hessian, bits=4, group_size=group_size, damping=0.05, sweeps=sweeps)
    assert found.mask is not None and found.damping == 0.05
    assert (kept_of_every_quad(found.mask) == 2).all()
    assert (found.codes[~found.mask] == 8).all() and found.codes.amax() <= 15
    assert found.codes.shape == (K, N) and found.scales.shape == (K // group_size, N)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sweeps_never_raise_the_error(seed: int, masked: bool) -> None:
    weight, hessian = problem(seed=seed)
    mask = random_mask(K, N) if masked else None
    before = torch.full((2, N), torch.inf, dtype=torch.float64)
    full = damped(hessian, 0.05)
    for sweeps in range(4):
        found = solve(weight, hessian, bits=4, group_size=64, damping=0.05, sweeps=sweeps, mask=mask)
        errors = (weight - prune(weight, hessian, damping=0.05, sweeps=sweeps, mask=mask)[0]).double().T
        after = torch.stack((objective(found, weight, full, 64), ((full @ errors) * errors).sum(0)))
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_choosing_the_mask_with_the_codes_beats_every_mask_chosen_before() -> None:
    weight, hessian = problem()
    settings = {"bits": 4, "group_size": 128, "damping": 0.05, "sweeps": 2}
    free = objective(solve(weight, hessian, **settings), weight, hessian, 128).sum()
    for method in METHODS:
        mask = choose_mask(weight, hessian, method=method)
        fixed = objective(solve(weight, hessian, **settings, mask=mask), weight, hessian, 128).sum()
        assert free < fixed
    dense = gptq.solve(weight, hessian, **settings)
    assert objective(dense, weight, hessian, 128).sum() < free


@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_given_mask_is_kept_exactly(sweeps: int) -> None:
    weight, hessian = problem()
    mask = random_mask(K, N)
    found = solve(weight, hessian, bits=4, group_size=64, damping=0.05, sweeps=sweeps, mask=mask)
    assert torch.equal(found.mask, mask)
    assert (found.codes[~mask] == 8).all()
    pruned, kept = prune(weight, hessian, damping=0.05, sweeps=sweeps, mask=mask)
    assert torch.equal(kept, mask)
    assert not pruned.T[~mask].any() and pruned.T[mask].all()


def test_a_weight_that_is_sparse_already_stays_so() -> None:
    weight, hessian = problem()
    weight = weight * random_mask(K, N).T
    weight[0, :4] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    weight[1, :4] = 0
    mask = complete_mask(weight)
    assert (kept_of_every_quad(mask) == 2).all()
    assert not weight[~mask.T].any()
    assert torch.equal(prune(weight, hessian, damping=0.05, sweeps=2, mask=mask)[0], weight)
    weight[2, :4] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(ValueError, match="more than two"):
        complete_mask(weight)


@pytest.mark.parametrize("sweeps", [0, 2])
def test_dead_inputs_disturb_nothing(sweeps: int) -> None:
    weight, hessian = problem()
    dead = torch.cat((torch.arange(0, K, 7), torch.arange(8, 12)))
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=sweeps)
    assert found.damping == 0.05 and objective(found, weight, hessian, 128).isfinite().all()
    assert (kept_of_every_quad(found.mask) == 2).all()
    # a quad of nothing but dead inputs keeps the largest, rounded to nearest
    quad = slice(8, 12)
    magnitude = choose_mask(weight, hessian, method="magnitude")[quad]
    rounded = nearest(weight, found.scales, 128)[quad]
    same = (found.mask[quad] == magnitude).all(0)
    assert same.double().mean() > 0.9  # rounding may turn the order of two that are close
    assert torch.equal(found.codes[quad][:, same], torch.where(magnitude, rounded, 8)[:, same])


@pytest.mark.parametrize("hessian", [torch.zeros(K, K), indefinite(3.0)], ids=["zero", "indefinite"])
def test_without_a_usable_hessian_the_largest_are_kept_and_it_is_said(hessian: Tensor) -> None:
    weight, _ = problem()
    pruned, mask = prune(weight, hessian, damping=0.05, sweeps=2)
    assert torch.equal(mask, choose_mask(weight, hessian, method="magnitude"))
    assert torch.equal(pruned, weight * mask.T)
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=2)
    assert found.damping is None
    assert (kept_of_every_quad(found.mask) == 2).all()
    rounded = nearest(weight, found.scales, 128)
    assert torch.equal(found.codes, torch.where(found.mask, rounded, 8))


def test_damping_is_raised_until_the_hessian_can_be_factorised() -> None:
    weight, _ = problem()
    hessian = indefinite(0.3)
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=2)
    assert found.damping == 0.5 and objective(found, weight, hessian, 128).isfinite().all()


def test_weights_too_large_for_any_scale_spoil_no_others() -> None:
    weight, hessian = problem()
    alone = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=1)
    weight[5] *= 1e8
    found = solve(weight, hessian, bits=4, group_size=128, damping=0.05, sweeps=1)
    assert (kept_of_every_quad(found.mask) == 2).all()
    others = [n for n in range(N) if n != 5]
    assert torch.equal(found.codes[:, others], alone.codes[:, others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_solved_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    weight, hessian = problem(128, 32)
    half = weight.to(dtype)
    one, other = (
        solve(w, hessian, bits=4, group_size=128, damping=0.05, sweeps=1) for w in (half, half.float())
    )
    assert torch.equal(one.codes, other.codes) and torch.equal(one.mask, other.mask)
    assert prune(half, hessian, damping=0.05, sweeps=1)[0].dtype == dtype


def test_the_same_problem_has_the_same_solution() -> None:
    weight, hessian = problem()
    kept = weight.clone(), hessian.clone()
    one, other = (solve(weight, hessian, bits=4, group_size=64, damping=0.05, sweeps=2) for _ in range(2))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.mask, other.mask)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_the_bytes_that_a_weight_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the sums of its inputs on."""
    k, n = 512, 256
    # as little beside such a matrix as ours beside a large one
    for module, elements in ((factors, "REORDERED"), (sparsity, "MULTIPLIED")):
        monkeypatch.setattr(module, elements, 1 << 13)
    x, weight = torch.randn(1, 2 * k, k), torch.randn(1, n, k)
    with Peak() as peak:
        hessian, products = (x.mT @ x / len(x[0]) for _ in range(2))
        factor = sparsity.factor_quads(hessian, 0.05)
        (target,) = compensated(weight, factor, products @ weight.mT, tokens=[2 * k])
        sparsity.solve(target, factor, bits=4, group_size=128, sweeps=1)
    assert 0.8 < peak.most / (gptq.bytes_taken(k, n) + sparsity.bytes_beside(k, n)) < 1.1


def one_compensated(
    weight: Tensor, hessian: Tensor, wanted: Tensor, *, damping: float, tokens: int
) -> Tensor:
    factor = Factor(hessian[None].clone(), damping)
    return compensated(weight[None], factor, wanted[None], tokens=[tokens])[0]


def test_a_weight_is_moved_to_the_least_squares_fit_of_the_original_outputs() -> None:
    weight, _ = problem(32, 8)
    random = torch.Generator().manual_seed(3)
    original = torch.randn(400, 32, generator=random)
    x = original + 0.3 * torch.randn(400, 32, generator=random) @ torch.randn(32, 32, generator=random)
    hessian, wanted = Hessian(32, x.device), Products(32, 8, x.device)
    for part in (slice(0, 100), slice(100, 400)):
        hessian.add(x[part].view(2, -1, 32))
        wanted.add(x[part].view(2, -1, 32), original[part].view(2, -1, 32) @ weight.T)
    moved = one_compensated(weight, hessian.mean(), wanted.mean(), damping=1e-6, tokens=400)
    fit = torch.linalg.lstsq(x.double(), original.double() @ weight.double().T).solution.T
    torch.testing.assert_close(
        moved.double(), weight + SHARE / (1 + 16 * 32 / 400) * (fit - weight), rtol=1e-3, atol=1e-3
    )


def test_most_of_what_drift_costs_is_made_up_for() -> None:
    """Less than all of it: the fit is to the calibration text."""
    weight, _ = problem(32, 8)
    random = torch.Generator().manual_seed(3)
    original = torch.randn(400, 32, generator=random)
    x = original @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=random))
    hessian, wanted = Hessian(32, x.device), Products(32, 8, x.device)
    hessian.add(x)
    wanted.add(x, original @ weight.T)
    moved = one_compensated(weight, hessian.mean(), wanted.mean(), damping=1e-6, tokens=10**6)
    left, before = (x @ moved.T - original @ weight.T).norm(), (x @ weight.T - original @ weight.T).norm()
    assert 0.1 < left / before < 0.5


def test_without_drift_or_without_inputs_the_weight_stays() -> None:
    weight, hessian = problem(32, 8)
    torch.testing.assert_close(
        one_compensated(weight, hessian, hessian @ weight.T, damping=0.05, tokens=400), weight
    )
    nothing = torch.zeros(32, 32)
    still = one_compensated(weight, nothing, nothing @ weight.T, damping=0.05, tokens=400)
    assert torch.equal(still, weight)
