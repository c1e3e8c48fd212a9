"""The numbers that tuning is made of, beside hand-written formulas and plain torch."""

import pytest
import torch
from torch import Tensor

from marlin_convert.solvers import gptq, straight_through
from marlin_convert.solvers.scales import SMALLEST
from marlin_convert.solvers.straight_through import Adam, TunedMatrix, TunedVector, divergence

GROUP = 16


def random_matrix(bits: int, *, sparse: bool = False) -> tuple[TunedMatrix, Tensor, Tensor, Tensor | None]:
    """A matrix of 8 outputs and 32 inputs, its codes (n, k), scales (n, groups) and what is kept."""
    generator = torch.Generator().manual_seed(bits)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (8, 32), generator=generator).float()
    scales = (0.1 * torch.randn(8, 2, generator=generator)).half().float()
    kept = (torch.rand(8, 32, generator=generator) < 0.5) if sparse else None
    codes = codes if kept is None else codes * kept
    offsets = (torch.rand(8, 32, generator=generator) - 0.5) * 0.98
    latents = straight_through.to_latents(codes + (offsets if kept is None else offsets * kept), bits)
    adam = Adam()
    matrix = TunedMatrix(
        latents, scales.T.half(), bits=bits, kept=kept, adam=adam, rates=(5e-3, 1e-3)
    )  # fmt: skip
    adam.begin(0, 1.0)
    return matrix, codes, scales, kept


@pytest.mark.parametrize("bits", [4, 8])
def test_latents_round_to_their_codes_and_saturate(bits: int) -> None:
    most = (1 << (bits - 1)) - 1
    values = torch.tensor([-0.499, 0.499, 0.501, most + 5.0, -most - 9.0, -1.501])
    codes = straight_through.to_codes(straight_through.to_latents(values, bits))
    assert codes.tolist() == [0, 0, 1, most, -most - 1, -2]


@pytest.mark.parametrize("bits, sparse", [(4, False), (8, False), (4, True)])
def test_the_weight_and_its_gradients_are_those_of_the_formula(bits: int, sparse: bool) -> None:
    matrix, codes, scales, kept = random_matrix(bits, sparse=sparse)
    weight = matrix.weight(torch.float32)
    expected = torch.cat([codes[:, :GROUP] * scales[:, :1], codes[:, GROUP:] * scales[:, 1:]], 1)
    assert torch.equal(weight, expected)

    gradient = torch.randn(8, 32)
    of_latents, of_shifts = matrix.gradients(gradient)
    # d weight / d latent = scale, as if nothing were rounded; d weight / d shift = code * scale
    wide = scales.repeat_interleave(GROUP, 1)
    mask = 1.0 if kept is None else kept.float()
    torch.testing.assert_close(of_latents, gradient * wide * mask)
    torch.testing.assert_close(of_shifts, (gradient * codes * wide).view(8, 2, GROUP).sum(-1))


def test_a_backward_moves_what_it_goes_through_as_adam_would() -> None:
    """Beside torch's own Adam in float32; latents have 12 binary digits, their moments are bfloat16."""
    matrix, *_ = random_matrix(4)
    start = matrix.state["latents"].float() / 4096
    latents, shifts = start.clone().requires_grad_(), torch.zeros(8, 2).requires_grad_()
    reference = torch.optim.Adam(
        [{"params": [latents], "lr": 5e-3}, {"params": [shifts], "lr": 1e-3}], betas=(0.9, 0.95), eps=1e-12
    )
    for step in range(5):
        x, wanted = torch.randn(20, 32), torch.randn(20, 8)
        matrix._adam.begin(step, 1.0)
        of_weight = 2 * (x @ matrix.dequantized(torch.float32).T - wanted).T @ x
        latents.grad, shifts.grad = matrix.gradients(of_weight)
        (x @ matrix.weight(torch.float32).T - wanted).square().sum().backward()
        reference.step()
    moved = matrix.state["latents"].float() / 4096
    assert (moved - start).abs().max() > 4e-3
    torch.testing.assert_close(moved, latents.detach(), atol=6e-4, rtol=0)
    torch.testing.assert_close(matrix.state["shifts"], shifts.detach(), atol=1e-6, rtol=1e-4)
    assert matrix._of_latents.grad is None


def test_a_mask_is_kept_however_far_codes_move() -> None:
    matrix, _, _, kept = random_matrix(4, sparse=True)
    assert kept is not None
    matrix._rates = (1.0, 0.0)
    for step in range(20):
        matrix._adam.begin(step, 1.0)
        (matrix.weight(torch.float32) * torch.randn(8, 32)).sum().backward()
    matrix.settle()
    codes, _ = matrix.result()
    assert not (codes.T[~kept].int() - 8).any()
    assert (codes.T[kept].int() - 8).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_scale_that_would_cross_zero_stays_on_its_side(sign: float) -> None:
    matrix, *_ = random_matrix(4)
    matrix.scales = matrix.scales.abs() * sign
    matrix.state["shifts"].fill_(-1.5)
    matrix.settle()
    assert (matrix.scales == sign * SMALLEST).all()


def test_a_vector_moves_by_shares_and_settles_on_its_type() -> None:
    adam = Adam()
    vector = TunedVector(torch.tensor([1.0, -2.0, 0.0, 4.0]), adam=adam, rate=1e-2)
    adam.begin(0, 1.0)
    (vector.value() * torch.tensor([1.0, 1.0, 1.0, -1.0])).sum().backward()
    vector.step()
    torch.testing.assert_close(vector.value().detach(), torch.tensor([0.99, -2.02, 0.0, 4.04]))
    vector.settle(torch.bfloat16)
    assert torch.equal(vector.value().detach(), torch.tensor([0.99, -2.02, 0.0, 4.04]).bfloat16().float())


def test_latents_start_where_the_error_is_least_given_all_other_codes() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(200, 32), torch.randn(4, 32)
    hessian = x.T @ x / 200
    found = gptq.solve(target, hessian, bits=4, group_size=GROUP, damping=1e-6, sweeps=1)
    latents = straight_through.residual_latents(
        target, hessian, found.codes, found.scales, bits=4, damping=1e-6
    )
    signed = found.codes.T.float() - 8
    assert torch.equal(straight_through.to_codes(latents).float(), signed)
    scale = found.scales.T.float().repeat_interleave(GROUP, 1)
    values = (latents.float() + 0.5) / 4096 - 0.5
    for n, k in ((0, 0), (1, 5), (3, 31)):
        # the value of this one code at which the squared error of the output has no slope
        others = signed[n] * scale[n]
        others[k] = 0
        missing = x @ (target[n] - others)
        best = (x[:, k] @ missing) / (x[:, k] @ x[:, k]) / scale[n, k]
        best = best.clamp(signed[n, k] - 0.499, signed[n, k] + 0.499)
        torch.testing.assert_close(values[n, k], best, atol=3e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_in_pieces_is_that_of_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs, ours = 3 * torch.randn(700, 50), 3 * torch.randn(700, 50)
    ours = ours.to(dtype).requires_grad_()
    whole = ours.detach().float().requires_grad_()
    expected = torch.nn.functional.kl_div(
        whole.log_softmax(-1), theirs.to(dtype).float().log_softmax(-1), log_target=True, reduction="sum"
    )
    expected.backward()
    found = divergence(ours, theirs.to(dtype))
    found.backward()
    torch.testing.assert_close(found, expected)
    assert ours.grad is not None and whole.grad is not None
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 1e-2}
    torch.testing.assert_close(ours.grad.float(), whole.grad, **close)
