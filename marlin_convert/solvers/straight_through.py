"""Codes and scales that gradients move: straight through the rounding (arXiv 1308.3432), by Adam's steps.

A weight is codes * scales, as it is written. Every code has a latent beside it, a fixed-point number whose
nearest integer is the code: gradients pass through the rounding as if it were not there and move the latent;
once it has gone half a step the code changes. With what Adam keeps a weight takes six bytes (4 bits).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from marlin_convert.solvers.gptq import feedback_precision
from marlin_convert.solvers.scales import SMALLEST

# Binary digits of a latent after the point: steps of a 4096th of a code, and 4 bits of code fill 16.
FRACTION = 12
# How near to the next code a latent may start.
NEAREST = 0.499
# Adam's decays (arXiv 1412.6980); none of the weights.
DECAYS = 0.9, 0.95
# Positions whose probabilities over the vocabulary are in memory at once.
POSITIONS = 256


def to_latents(values: Tensor, bits: int) -> Tensor:
    """Latents, int16 for 4 bits and int32 for 8, of values counted in codes, float32; codes saturate.

    A latent is floor((value + 0.5) * 2 ** FRACTION), so that shifting FRACTION digits out rounds.
    """
    low, high = _range(bits)
    fixed = ((values + 0.5) * 2**FRACTION).floor_().clamp_(low, high)
    return fixed.to(torch.int16 if bits == 4 else torch.int32)


def to_codes(latents: Tensor) -> Tensor:
    """The signed codes that latents round to, in their type."""
    return latents >> FRACTION


def _range(bits: int) -> tuple[int, int]:
    """The lowest and the highest latent."""
    most = 1 << (bits - 1 + FRACTION)
    return -most, most - 1


def residual_latents(
    target: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    damping: float,
    kept: Tensor | None = None,
) -> Tensor:
    """Latents (n, k) where the solver's residual puts them: at the best value given all other codes.

    target (n, k), what was solved for, hessian (k, k), codes (k, n) uint8, scales (groups, n), kept (k, n)
    bool or None. They stay nearest to their codes; with `kept` (2:4) they start on them, for a mask that is
    fixed leaves errors that no code can make up for.
    """
    signed = codes.T.float() - (1 << (bits - 1))
    if kept is not None:
        return to_latents(signed, bits)
    scale = scales.T.float().repeat_interleave(len(codes) // len(scales), 1)
    errors = target.float() - signed * scale
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean()
    with feedback_precision(target.device):
        best = (errors @ hessian + ridge * errors) / (diagonal + ridge)
    # no inputs at all: nothing says where else to start
    shift = (best / scale).nan_to_num_(0.0).clamp_(-NEAREST, NEAREST)
    return to_latents(signed + shift, bits)


class Adam:
    """The steps of Adam, whose moments others hold; `begin` each step with its rate."""

    def __init__(self, sum_up: Callable[[Sequence[Tensor]], None] = lambda gradients: None) -> None:
        """`sum_up` makes gradients, in place, those of all processes that share the steps."""
        self.step, self.rate = 0, 0.0
        self._sum_up = sum_up

    def begin(self, step: int, rate: float) -> None:
        """The step is counted from 0; `rate` multiplies every learning rate."""
        self.step, self.rate = step, rate

    def change(self, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What a float32 gradient says to add, times the learning rate; both moments are moved on.

        They may be of a narrower type: what is computed with them is float32.
        """
        self._sum_up([gradient])
        one, two = DECAYS
        mean = first.float().lerp(gradient, 1 - one)
        square = second.float().mul(two).addcmul_(gradient, gradient, value=1 - two)
        first.copy_(mean)
        second.copy_(square)
        past = self.step + 1
        root = square.div_(1 - two**past).sqrt_().add_(1e-12)
        return mean.div_(1 - one**past).div_(root).mul_(-self.rate)


class TunedMatrix:
    """A packed weight (n, k) whose latents and scales move as soon as their gradients are known.

    So no set of gradients is ever held. `state` has every tensor that moves, by name: latents (n, k), their
    moments in bfloat16, shifts (n, groups), by which share the scales have moved, with moments in float32.
    """

    def __init__(
        self,
        latents: Tensor,
        scales: Tensor,
        *,
        bits: int,
        kept: Tensor | None,
        adam: Adam,
        rates: tuple[float, float],
    ):
        """Start from latents (n, k) and scales (groups, n) fp16; kept (n, k) bool, what 2:4 leaves: other
        codes stay 0.

        `rates` are the learning rates of the latents, in codes, and of the scales, in shares of them.
        """
        self.bits, self.kept = bits, kept
        self.scales = scales.T.float().contiguous()
        self._adam, self._rates = adam, rates
        self.state = {
            "latents": latents,
            "first": torch.zeros_like(latents, dtype=torch.bfloat16),
            "second": torch.zeros_like(latents, dtype=torch.bfloat16),
            "shifts": torch.zeros_like(self.scales),
            "shifts_first": torch.zeros_like(self.scales),
            "shifts_second": torch.zeros_like(self.scales),
        }
        # leaves of autograd that take no memory: gradients come to them, and what moves is not a float
        nothing = torch.zeros((), device=latents.device)
        self._of_latents = nothing.expand(latents.shape).requires_grad_()
        self._of_shifts = nothing.expand(self.scales.shape).requires_grad_()
        self._of_latents.register_post_accumulate_grad_hook(self._move_latents)
        self._of_shifts.register_post_accumulate_grad_hook(self._move_shifts)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (n, k) as it is now; to run backward through it moves it."""
        return _StraightThrough.apply(self._of_latents, self._of_shifts, self, dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """codes * scales, (n, k)."""
        latents = self.state["latents"]
        grouped = to_codes(latents).view(*self.scales.shape, -1)
        return (grouped * self._moved()[..., None]).to(dtype).view(latents.shape)

    def _moved(self) -> Tensor:
        """The scales as they are now, (n, groups)."""
        return self.scales * (1 + self.state["shifts"])

    def gradients(self, of_weight: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the weight (n, k) those of the latents, (n, k), and of the shifts, float32."""
        latents = self.state["latents"]
        grouped = of_weight.float().view(*self.scales.shape, -1)
        of_shifts = (grouped * to_codes(latents).view(grouped.shape)).sum(-1).mul_(self.scales)
        of_latents = (grouped * self._moved()[..., None]).view(latents.shape)
        if self.kept is not None:
            of_latents *= self.kept
        return of_latents, of_shifts

    def _move_latents(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        change = self._adam.change(gradient, self.state["first"], self.state["second"])
        low, high = _range(self.bits)
        change.mul_(self._rates[0] * 2**FRACTION).add_(self.state["latents"]).round_().clamp_(low, high)
        self.state["latents"].copy_(change)

    def _move_shifts(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        moments = self.state["shifts_first"], self.state["shifts_second"]
        self.state["shifts"].add_(self._adam.change(gradient, *moments), alpha=self._rates[1])

    def settle(self) -> None:
        """Round the scales to the float16 that they are written as; none has changed its sign."""
        sign = self.scales.sign()
        moved = (self._moved() * sign).clamp_(min=SMALLEST)
        self.scales = (moved * sign).half().float()
        self.state["shifts"].zero_()

    def result(self) -> tuple[Tensor, Tensor]:
        """Codes (k, n) uint8 and scales (groups, n) float16 of a matrix that has settled."""
        return unsigned(self.state["latents"], self.bits), self.scales.T.half().contiguous()


def unsigned(latents: Tensor, bits: int) -> Tensor:
    """The codes of latents (n, k) as a format holds them: (k, n) uint8."""
    return (to_codes(latents) + (1 << (bits - 1))).to(torch.uint8).T.contiguous()


class _StraightThrough(torch.autograd.Function):
    """The weight of a TunedMatrix; nothing is saved for backward, when the matrix is still as it was."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, __: Tensor, matrix: TunedMatrix, dtype: torch.dtype) -> Tensor:
        ctx.matrix = matrix
        return matrix.dequantized(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *ctx.matrix.gradients(gradients[0]), None, None


class TunedVector:
    """A vector that moves by shares of its values, as a norm's weight does; `step` once its gradient is in.

    `state` has every tensor that moves: shifts, by which share, and their moments, all float32.
    """

    def __init__(self, values: Tensor, *, adam: Adam, rate: float):
        self.values = values.float()
        self._adam, self._rate = adam, rate
        self.state = {
            "shifts": torch.zeros_like(self.values).requires_grad_(),
            "first": torch.zeros_like(self.values),
            "second": torch.zeros_like(self.values),
        }

    def value(self) -> Tensor:
        """The vector as it is now, float32."""
        return self.values * (1 + self.state["shifts"])

    @torch.no_grad()
    def step(self) -> None:
        """Move; a vector that no gradient has come to stays."""
        shifts = self.state["shifts"]
        gradient, shifts.grad = shifts.grad, None
        if gradient is not None:
            change = self._adam.change(gradient, self.state["first"], self.state["second"])
            shifts.add_(change, alpha=self._rate)

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        """Round it to the type that it is written as."""
        self.values = self.value().to(dtype).float()
        self.state["shifts"].zero_()


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """The sum over positions of KL(theirs || ours), for logits (positions, vocabulary); gradients to `ours`.

    Probabilities exist of a few positions at a time, in float32.
    """
    return _Divergence.apply(ours, theirs)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        total = torch.zeros((), device=ours.device)
        gradient = torch.empty_like(ours)
        for q, p, of_q in zip(*(x.split(POSITIONS) for x in (ours, theirs, gradient)), strict=True):
            q, p = q.float().log_softmax(-1), p.float().log_softmax(-1)
            probabilities = p.exp()
            total += p.sub_(q).mul_(probabilities).sum()
            of_q.copy_(q.exp_().sub_(probabilities))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.saved_tensors[0] * gradients[0], None
