"""What becomes of the linears that read one input, or of many such that are alike, given its sums."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_convert.errors import SourceError
from marlin_convert.matrix import Fate
from marlin_convert.models.blocks import BlockModel
from marlin_convert.plan import Plan
from marlin_convert.quantized import QuantizedLinear, dequantized, first_crowded, quad_nonzeros
from marlin_convert.ranks import Share
from marlin_convert.solvers import gptq, sparsity
from marlin_convert.solvers.drift import MOST, compensated
from marlin_convert.solvers.factor import Factor
from marlin_convert.solvers.gptq import Solution
from marlin_convert.solvers.straight_through import residual_latents
from marlin_convert.sums import Sums


@dataclass(frozen=True)
class Solved:
    """What a matrix has become: codes and scales or, where it is only pruned, a weight (n, k).

    `row` is what the manifest says of it, `energies` are those of its error and of its outputs; `latents`
    (n, k) are where tuning starts, if it follows.
    """

    fate: Fate
    found: QuantizedLinear | Tensor
    row: dict[str, Any]
    energies: Tensor
    latents: Tensor | None = None


class StageSolver:
    """Solves stages, the linears of each as one matrix, and puts what was found into the model.

    `claimed` are the linears that the source says are 2:4.
    """

    def __init__(self, plan: Plan, model: BlockModel, claimed: set[str]):
        self._plan = plan
        self._recipe = plan.recipe
        self._model = model
        self._claimed = claimed

    def find(self, stages: list[list[Fate]], sums: list[Sums], share: Share) -> Iterator[list[Solved]]:
        """Solve a share of the outputs of linears: one kind of them after another.

        What is found of a share only is not put into the model.
        """
        hessians = _batch([one.hessian() for one in sums])
        finite = hessians.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise self.overflow(f"the inputs of {stages[finite.index(False)][0].name} are")
        # those of a kind as one matrix, and side by side the stages that have the same kinds
        kinds = [tuple(map(kind_of, fates)) for fates in stages]
        for same in dict.fromkeys(kinds):
            these = [number for number, found in enumerate(kinds) if found == same]
            read = hessians if len(these) == len(stages) else hessians[these]
            for kind in sorted(set(same)):
                chosen = [
                    [
                        fate
                        for fate, one in zip(stages[number], same, strict=True)
                        if one == kind and share.range(fate.n)  # some have fewer outputs than there are ranks
                    ]
                    for number in these
                ]
                solve = self._prune if kind == (True, True) else self._quantize
                if chosen[0]:
                    yield solve(chosen, [sums[number] for number in these], read, share)

    def _weights(self, fates: list[Fate], share: Share) -> list[Tensor]:
        weights = [self._model.model.get_parameter(f"{fate.name}.weight") for fate in fates]
        return [weight[share.slice(len(weight))] for weight in weights]

    def _put(self, fate: Fate, written: Tensor, share: Share) -> None:
        if share == Share():
            self._model.replace(fate.name, written.to(self._model.dtype))

    def _targets(
        self,
        weights: list[list[Tensor]],
        sums: list[Sums],
        factor: Factor,
        share: Share,
        *,
        most: float | None = MOST,
    ) -> Tensor:
        """What is solved for, (batch, n, k): weights as one, or what makes up for the drift of the inputs."""
        whole = _batch([one[0] if len(one) == 1 else torch.cat(one) for one in weights])
        wanted = [one.wanted(weight, share) for one, weight in zip(sums, whole, strict=True)]
        known = [one for one in wanted if one is not None]
        if not known:
            return whole
        batch = _batch(known)
        del wanted, known  # those of experts are copied
        if not batch.isfinite().all():
            raise self.overflow("the original's outputs are")
        return compensated(whole, factor, batch, tokens=[one.tokens for one in sums], most=most)

    def _in_quads(
        self, weights: list[list[Tensor]], sums: list[Sums], hessians: Tensor, share: Share
    ) -> Iterator[tuple[Tensor, Factor]]:
        """Of one matrix after another what is solved for, (n, k), and the factor for its quads."""
        for own, one, hessian in zip(weights, sums, hessians, strict=True):
            factor = sparsity.factor_quads(hessian[None], self._recipe.damping)
            # with half of the weights gone, the others have further to go
            (target,) = self._targets([own], [one], factor, share, most=None)
            yield target, factor
            factor.restore()

    def _quantize(
        self, stages: list[list[Fate]], sums: list[Sums], hessians: Tensor, share: Share
    ) -> list[Solved]:
        recipe = self._recipe
        layout = stages[0][0].layout  # engines load a stage, and all experts, as one: they have one layout
        group_size = hessians.shape[1] if layout.group_size == -1 else layout.group_size
        weights = [self._weights(fates, share) for fates in stages]
        settings: dict[str, Any] = {
            "bits": layout.bits,
            "group_size": group_size,
            "sweeps": recipe.sweeps,
            "positive": recipe.scales == "positive",
        }
        targets: list[Tensor] = []
        found: list[Solution] = []
        if layout.sparse:
            masks = [self._mask(fates, share) for fates in stages]
            one_by_one = self._in_quads(weights, sums, hessians, share)
            for (target, factor), mask in zip(one_by_one, masks, strict=True):
                targets.append(target)
                found.append(sparsity.solve(target, factor, mask=mask, **settings))
        else:
            factor = Factor(hessians, recipe.damping)
            batch = self._targets(weights, sums, factor, share)
            targets.extend(batch)
            found = gptq.solve_batch(batch, factor, **settings)
            factor.restore()
        layers = [
            list(_divided(of_all, own, group_size, layout.bits))
            for of_all, own in zip(found, weights, strict=True)
        ]
        solved: list[list[Solved]] = [[] for _ in stages]
        start = 0
        for place in range(len(stages[0])):  # those that stand at one place of their stages are of one shape
            written = dequantized([one[place] for one in layers])
            energies = _energies(hessians, _batch([own[place] for own in weights]), _batch(written))
            outputs = slice(start, start + len(written[0]))
            start = outputs.stop
            for number, of_all in enumerate(found):
                fate, layer = stages[number][place], layers[number][place]
                self._put(fate, written[number], share)
                row = fate.row() | {"error": None} | _damping(of_all)
                if sums[number].routed is not None:
                    row["tokens"] = sums[number].routed
                latents = None
                if self._plan.tunes:
                    latents = residual_latents(
                        targets[number][outputs], hessians[number], layer.codes, layer.scales,
                        bits=layout.bits, damping=of_all.damping or 1.0, kept=layer.kept,
                    )  # fmt: skip
                solved[number].append(Solved(fate, layer, row, energies[number], latents))
        return [one for of_stage in solved for one in of_stage]

    def _mask(self, fates: list[Fate], share: Share) -> Tensor | None:
        """What weights that are 2:4 keep, None if they are not; SourceError if they are said to be.

        It is given for a share of their outputs.
        """
        quads = [quad_nonzeros(weight) for weight in self._weights(fates, Share())]
        crowded = [int((held > 2).sum()) for held in quads]
        if not any(crowded):
            return sparsity.complete_mask(torch.cat(self._weights(fates, share)))
        for fate, held, count in zip(fates, quads, crowded, strict=True):
            if count and fate.name in self._claimed:
                raise SourceError(
                    f"{fate.name} is said to be 2:4 and is not: {count} quads have more than two "
                    f"non-zeros; {first_crowded(held)}.",
                    "prune it again: --sparsity 2:4 with the original, or sparsify.",
                )
        return None

    def _prune(
        self, stages: list[list[Fate]], sums: list[Sums], hessians: Tensor, share: Share
    ) -> list[Solved]:
        recipe = self._recipe
        weights = [self._weights(fates, share) for fates in stages]
        found: list[Tensor] = []
        if recipe.method == "sparsegpt":
            for target, factor in self._in_quads(weights, sums, hessians, share):
                moved = target.to(weights[0][0].dtype)
                found.append(sparsity.prune(moved, factor, sweeps=recipe.sweeps)[0])
        else:
            for weight, hessian in zip(map(torch.cat, weights), hessians, strict=True):
                found.append(weight * sparsity.choose_mask(weight, hessian, method=recipe.method).T)
        solved: list[Solved] = []
        for fates, own, pruned, hessian in zip(stages, weights, found, hessians, strict=True):
            for fate, old, new in zip(fates, own, pruned.split([len(one) for one in own]), strict=True):
                written = new.to(getattr(torch, fate.layout.dtype)).contiguous()
                self._put(fate, written, share)
                (energies,) = _energies(hessian[None], old[None], written[None])
                solved.append(Solved(fate, written, fate.row(), energies))
        return solved

    def overflow(self, what: str) -> SourceError:
        """The error for hidden states that are not finite."""
        dtype = str(self._model.dtype).removeprefix("torch.")
        hint = "its weights may be damaged; fetch the model again."
        if self._recipe.dtype == "float16" and self._model.weights.own_dtype != torch.float16:
            hint = "keep the model's own type, which reaches further, with --dtype auto."
        elif dtype == "float16":
            hint = "compute and write it in bfloat16, which reaches further, with --dtype bfloat16."
        return SourceError(f"{what} not finite: the model overflows on this text, computed in {dtype}.", hint)


def kind_of(fate: Fate) -> tuple[bool, bool]:
    """What linears that are solved as one have in common."""
    return fate.layout.sparse, fate.pruned


def _batch(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one; of a single one a view, for it may be large."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _divided(found: Solution, weights: list[Tensor], group_size: int, bits: int) -> Iterator[QuantizedLinear]:
    """What was found for weights (n, k) as one, for each of them."""
    start = 0
    for weight in weights:
        columns = slice(start, start + len(weight))
        start += len(weight)
        yield QuantizedLinear(
            found.codes[:, columns].contiguous(),
            found.scales[:, columns].contiguous(),
            group_size,
            bits,
            kept=None if found.mask is None else found.mask[:, columns].contiguous(),
        )


def _energies(hessians: Tensor, weights: Tensor, written: Tensor) -> Tensor:
    """||x (W - W_q)||^2 and ||x W||^2 on the calibration text, (batch, 2), for weights (batch, n, k)."""
    with gptq.feedback_precision(hessians.device):
        error = gptq.output_energy(hessians, (weights - written.float()).mT).sum(-1)
        return torch.stack([error, gptq.output_energy(hessians, weights.float().mT).sum(-1)], -1)


def _damping(found: Solution) -> dict[str, Any]:
    """What the manifest says of how the Hessian was factorised."""
    return {"damping": found.damping} | ({"rounded_to_nearest": True} if found.damping is None else {})
