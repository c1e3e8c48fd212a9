"""The codes that the solver finds for a dense source, one block after another."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.calibration import Calibration
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.codes import Packed, Tuned, pack
from marlin_convert.errors import SourceError
from marlin_convert.matrix import Fate
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.memory import memory_for_activations
from marlin_convert.models.stages import BlockWalk, Reached
from marlin_convert.models.structure import Stage
from marlin_convert.plan import Plan
from marlin_convert.quantized import QuantizedLinear, first_crowded, quad_nonzeros
from marlin_convert.solvers import gptq, sparsity
from marlin_convert.solvers.drift import MOST, Products, compensated
from marlin_convert.solvers.gptq import Solution
from marlin_convert.solvers.hessian import Hessian
from marlin_convert.solvers.straight_through import residual_latents

log = logging.getLogger("marlin_convert")


@dataclass(frozen=True)
class Solved:
    """What a matrix has become: codes and scales or, where it is only pruned, a weight (n, k).

    `row` is what the manifest says of it; `latents` (n, k) are where tuning starts, if it follows.
    """

    fate: Fate
    found: QuantizedLinear | Tensor
    row: dict[str, Any]
    latents: Tensor | None = None


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
            wanted = before.output + (drift if self._bias is None else drift - self._bias)
            self._of_outputs = True
        if self._products is None:
            self._products = Products(x.shape[-1], wanted.shape[-1], x.device, bf16_units=bf16_units)
        self._products.add(x, wanted.to(x.dtype))

    @cached_property
    def hessian(self) -> Tensor:
        """The mean of x^T x, (k, k) float32."""
        assert self._hessian is not None
        return self._hessian.mean()

    @cached_property
    def _mean(self) -> Tensor | None:
        return None if self._products is None else self._products.mean()

    def wanted(self, weight: Tensor) -> Tensor | None:
        """The mean of x^T y0, (k, n) float32, for the original `weight` (n, k); None if not known."""
        if self._mean is None or self._of_outputs:
            return self._mean
        return self._mean @ weight.T.float()


class Solve:
    """The codes that the solver finds for a dense source, one block after another.

    The original model walks beside the one that is made, so that what is solved for makes up for the drift of
    its inputs and of what is added to its outputs (solvers/drift.py); not with `effort` fast.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        calibration: Calibration,
        device: torch.device,
        *,
        directory: Path,
        trust_remote_code: bool,
    ):
        """Embed the calibration text; `directory` is for hidden states that no memory can hold."""
        self._plan = plan
        self._recipe = plan.recipe
        self._claimed = set(weights.sparse_linears(manifests.load(weights.checkpoint.directory)))
        self._model = BlockModel(weights, device, dtype=plan.dtype, trust_remote_code=trust_remote_code)
        self._hidden = HiddenStates(self._model, calibration.ids, directory)
        self._original = HiddenStates(self._model, calibration.ids, directory) if plan.compensates else None
        self.replayed = 0
        self.divergence: float | None = None
        self.tuned: Tuned | None = None

    def skip(self, done: int, weight: Callable[[Fate], Tensor]) -> None:
        """Take the text through the blocks that an earlier run has finished, with the weights it found."""
        plan = self._plan
        for number in range(done):
            log.debug("block %d was finished before, running the text through it", number)
            block = self._model.load(number)
            if self._original:
                self._original.advance(block, number)
            for fate in plan.worked_on_in(number):
                self._model.replace(fate.name, weight(fate).to(self._model.dtype))
            self._hidden.advance(block, number)
            self._model.unload(number)

    def block(self, number: int) -> Iterator[Packed]:
        """Every matrix of a block that is worked on, solved and packed."""
        for one in self.solved(number):
            if isinstance(one.found, Tensor):
                yield {f"{one.fate.name}.weight": one.found.cpu()}, one.row
            else:
                yield pack(one.fate, one.found, self._plan, one.row)

    def solved(self, number: int) -> Iterator[Solved]:
        """Solve the block stage by stage, with the inputs that the stages before leave it."""
        model = self._model
        stages = self._plan.stages(number)
        block = model.load(number)
        sums: dict[Stage, Sums] = {}
        solved: list[Solved] = []

        def solve_stage(stage: Stage) -> None:
            linears = [f"{model.name(number)}.{name}" for name in stage]
            solved.extend(self._solve(linears, sums.pop(stage)))

        walk = self._walk(self._hidden, block, number, solve_stage)
        both: Iterable[tuple[Reached, Reached | None]]
        if self._original is None:
            both = ((one, None) for one in walk.reach(stages, self._hidden.put))
        else:
            beside = self._walk(self._original, model.unchanging(block), number, None, walk)
            both = zip(
                walk.reach(stages, self._hidden.put), beside.reach(stages, self._original.put), strict=True
            )
        for one, before in both:
            if one.stage not in sums:
                linear = block.get_submodule(one.stage[0])
                assert isinstance(linear, nn.Linear)
                sums[one.stage] = Sums(linear.bias)
            sums[one.stage].add(one, before, bf16_units=model.bf16_products)
        self.replayed += walk.replayed
        model.unload(number)
        if number == self._plan.blocks - 1 and not self._hidden.finite():
            raise self._overflow(f"what {model.name(number)} gives is")
        if self._original is not None:
            self.divergence = float(f"{self._hidden.divergence(self._original):.6g}")
        yield from solved

    def _overflow(self, what: str) -> SourceError:
        """The error for hidden states that are not finite."""
        dtype = str(self._model.dtype).removeprefix("torch.")
        hint = "its weights may be damaged; fetch the model again."
        if self._recipe.dtype == "float16" and self._model.weights.own_dtype != torch.float16:
            hint = "keep the model's own type, which reaches further, with --dtype auto."
        elif dtype == "float16":
            hint = "compute and write it in bfloat16, which reaches further, with --dtype bfloat16."
        return SourceError(f"{what} not finite: the model overflows on this text, computed in {dtype}.", hint)

    def _walk(
        self,
        hidden: HiddenStates,
        block: nn.Module,
        number: int,
        solve: Callable[[Stage], None] | None,
        beside: BlockWalk | None = None,
    ) -> BlockWalk:
        model = self._model
        share = 2 if self._original else 1
        return BlockWalk(
            block, model.structure.parts[number], len(hidden), lambda i: hidden.forward(i, block, number),
            solve, keep_bytes=memory_for_activations(model.device) // share, dtype=model.dtype,
            beside=beside,
        )  # fmt: skip

    def _solve(self, linears: list[str], sums: Sums) -> Iterator[Solved]:
        """Solve the linears of a stage and put what they have become into the model."""
        if not sums.hessian.isfinite().all():
            raise self._overflow(f"the inputs of {linears[0]} are")
        fates = [self._plan.fates[linear] for linear in linears]
        # those of a kind as one matrix
        for kind in sorted({(fate.layout.sparse, fate.pruned) for fate in fates}):
            chosen = [fate for fate in fates if (fate.layout.sparse, fate.pruned) == kind]
            weights: list[Tensor] = [
                self._model.model.get_parameter(f"{fate.name}.weight") for fate in chosen
            ]
            solve = self._prune if kind == (True, True) else self._quantize
            yield from solve(chosen, weights, sums)

    def _target(self, weights: list[Tensor], sums: Sums, *, sparse: bool) -> Tensor:
        """What is solved for: the weights as one, (n, k), or what makes up for the drift of the inputs."""
        weight = torch.cat(weights)
        wanted = sums.wanted(weight)
        if wanted is None:
            return weight
        if not wanted.isfinite().all():
            raise self._overflow("the original's outputs are")
        # with half of the weights gone, the others have further to go
        most = None if sparse else MOST
        return compensated(
            weight, sums.hessian, wanted, damping=self._recipe.damping, tokens=sums.tokens, most=most
        )

    def _quantize(self, fates: list[Fate], weights: list[Tensor], sums: Sums) -> Iterator[Solved]:
        recipe, hessian = self._recipe, sums.hessian
        layout = fates[0].layout  # engines load a stage as one: it has one layout
        group_size = len(hessian) if layout.group_size == -1 else layout.group_size
        target = self._target(weights, sums, sparse=layout.sparse)
        settings: dict[str, Any] = {
            "bits": layout.bits,
            "group_size": group_size,
            "damping": recipe.damping,
            "sweeps": recipe.sweeps,
            "positive": recipe.scales == "positive",
        }
        if layout.sparse:
            found = sparsity.solve(target, hessian, mask=self._mask(fates, weights), **settings)
        else:
            found = gptq.solve(target, hessian, **settings)
        start = 0
        for fate, weight in zip(fates, weights, strict=True):
            columns = slice(start, start + len(weight))
            start += len(weight)
            layer = QuantizedLinear(
                found.codes[:, columns].contiguous(),
                found.scales[:, columns].contiguous(),
                group_size,
                layout.bits,
                kept=None if found.mask is None else found.mask[:, columns].contiguous(),
            )
            row = fate.row() | {"error": _error(hessian, weight, layer.dequantize())}
            row |= _damping(fate, found, recipe.damping)
            if sums.routed is not None:
                row["tokens"] = sums.routed
            self._model.replace(fate.name, layer.dequantize(self._model.dtype))
            log.debug("%s: relative output error %.4f", fate.name, row["error"])
            latents = None
            if self._plan.tunes:
                latents = residual_latents(
                    target[columns], hessian, layer.codes, layer.scales,
                    bits=layout.bits, damping=found.damping or 1.0, kept=layer.kept,
                )  # fmt: skip
            yield Solved(fate, layer, row, latents)

    def _mask(self, fates: list[Fate], weights: list[Tensor]) -> Tensor | None:
        """What weights that are 2:4 keep, None if they are not; SourceError if they are said to be."""
        quads = [quad_nonzeros(weight) for weight in weights]
        crowded = [int((held > 2).sum()) for held in quads]
        if not any(crowded):
            return sparsity.complete_mask(torch.cat(weights))
        for fate, held, count in zip(fates, quads, crowded, strict=True):
            if count and fate.name in self._claimed:
                raise SourceError(
                    f"{fate.name} is said to be 2:4 and is not: {count} quads have more than two "
                    f"non-zeros; {first_crowded(held)}.",
                    "prune it again: --sparsity 2:4 with the original, or sparsify.",
                )
        return None

    def _prune(self, fates: list[Fate], weights: list[Tensor], sums: Sums) -> Iterator[Solved]:
        recipe, hessian = self._recipe, sums.hessian
        if recipe.method == "sparsegpt":
            target = self._target(weights, sums, sparse=True).to(weights[0].dtype)
            pruned, _ = sparsity.prune(target, hessian, damping=recipe.damping, sweeps=recipe.sweeps)
        else:
            weight = torch.cat(weights)
            mask = sparsity.choose_mask(weight, hessian, method=recipe.method, damping=recipe.damping)
            pruned = weight * mask.T
        for fate, old, new in zip(fates, weights, pruned.split([len(one) for one in weights]), strict=True):
            written = new.to(getattr(torch, fate.layout.dtype)).contiguous()
            row = fate.row() | {"error": _error(hessian, old, written)}
            self._model.replace(fate.name, written.to(self._model.dtype))
            log.debug("%s: relative output error %.4f", fate.name, row["error"])
            yield Solved(fate, written, row)


def _error(hessian: Tensor, weight: Tensor, written: Tensor) -> float:
    """||x (W - W_q)|| / ||x W|| on the calibration text, to six digits, for weights (n, k)."""
    with gptq.feedback_precision(hessian.device):
        error, energy = (
            gptq.output_energy(hessian, one.T).sum().item()
            for one in (weight.float() - written.float(), weight.float())
        )
    return float(f"{(max(error, 0.0) / energy) ** 0.5:.6g}") if energy > 0 else 0.0


def _damping(fate: Fate, found: Solution, asked: float) -> dict[str, Any]:
    """What the manifest says of how the Hessian was factorised."""
    if found.damping is None:
        log.warning("%s: its Hessian could not be factorised; weights are rounded to nearest", fate.name)
        return {"damping": None, "rounded_to_nearest": True}
    if found.damping > asked:
        log.warning("%s: its Hessian needed damping %g, not %g", fate.name, found.damping, asked)
    return {"damping": found.damping}
