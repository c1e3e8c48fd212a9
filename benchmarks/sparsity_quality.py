"""Quality of 2:4 sparsity with int4 on a CPU: ours, its parts left out one by one, and a plain reference.

usage: python benchmarks/sparsity_quality.py MODEL [--text FILE] [--samples 128] [--length 1024]
           [--held-out 64] [--rows joint,separate,ours,...]

All rows share the token ids, the walk through the blocks and the evaluation, in float32; they differ in what
a stage's linears are replaced by. The reference prunes with SparseGPT and rounds with GPTQ as published, in
one pass (joint) or two (separate), scales searched on the kept weights.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from marlin_convert.calibration import calibrate, load_tokenizer
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.divergence import compare
from marlin_convert.hub import Source
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.stages import BlockWalk, Reached
from marlin_convert.models.structure import Stage
from marlin_convert.ranks import Share
from marlin_convert.solvers import sparsity
from marlin_convert.solvers.drift import compensated
from marlin_convert.solvers.factor import Factor
from marlin_convert.sums import Sums

CPU = torch.device("cpu")
GROUP = 128
DAMPING = 0.1
SWEEPS = 2

# (weight (n, k), Hessian) to the dequantized weight (n, k)
Solver = Callable[[Tensor, Tensor], Tensor]


class SolvedWeights(Weights):
    """A checkpoint of which some weights have been solved for."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.solved: dict[str, Tensor] = {}

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The solved weight, or the checkpoint's."""
        return self.solved[name].to(device) if name in self.solved else super().read(name, device)


def ours(weight: Tensor, hessian: Tensor, *, rule: str | None = None, sweeps: int = SWEEPS) -> Tensor:
    """Our solver; a `rule` fixes the mask in advance."""
    mask = None
    if rule == "sparsegpt":
        mask = sparsity.prune(weight, sparsity.factor_quads(hessian[None].clone(), DAMPING), sweeps=0)[1]
    elif rule:
        mask = sparsity.choose_mask(weight, hessian, method=rule)
    factor = sparsity.factor_quads(hessian[None].clone(), DAMPING)
    found = sparsity.solve(weight, factor, bits=4, group_size=GROUP, sweeps=sweeps, mask=mask)
    assert (found.mask.view(-1, 4, len(weight)).sum(1) == 2).all()
    return ((found.codes.float() - 8) * found.scales.float().repeat_interleave(GROUP, 0)).T


def reference(weight: Tensor, hessian: Tensor, *, joint: bool) -> Tensor:
    """SparseGPT and GPTQ in one pass, or one after the other."""
    if joint:
        return _reference_pass(weight, hessian, prune=True, quantize=True)[0]
    pruned, mask = _reference_pass(weight, hessian, prune=True, quantize=False)
    return _reference_pass(pruned, hessian, prune=False, quantize=True, mask=mask)[0]


def _reference_pass(
    weight: Tensor, hessian: Tensor, *, prune: bool, quantize: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Columns one after another, as both papers have it; groups are the blocks of 128 columns."""
    w = weight.clone()
    n, k = w.shape
    hessian = hessian.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    diagonal = upper.diagonal()
    mask = torch.zeros_like(w, dtype=torch.bool) if mask is None else mask
    found = torch.zeros_like(w)
    scale = torch.ones(n)
    for i in range(k):
        if i % GROUP == 0:
            block = slice(i, i + GROUP)
            if prune:  # a forecast of the block's mask, for its scales
                mask[:, block] = _largest_pair((w[:, block] / diagonal[block]) ** 2)
            kept = w[:, block] * mask[:, block]
            scale = _reference_scale(kept, hessian.diagonal()[block])
        if prune and i % 4 == 0:
            quad = slice(i, i + 4)
            mask[:, quad] = _largest_pair((w[:, quad] / diagonal[quad]) ** 2)
        value = torch.clamp(torch.round(w[:, i] / scale), -8, 7) * scale if quantize else w[:, i]
        found[:, i] = value * mask[:, i]
        w[:, i + 1 :] -= ((w[:, i] - found[:, i]) / diagonal[i])[:, None] * upper[i, i + 1 :]
    return found, mask


def _largest_pair(saliency: Tensor) -> Tensor:
    quads = saliency.view(len(saliency), -1, 4)
    mask = torch.zeros_like(quads, dtype=torch.bool).scatter_(-1, quads.topk(2, -1).indices, True)
    return mask.view(saliency.shape)


def _reference_scale(kept: Tensor, importance: Tensor) -> Tensor:
    scales, errors = [], []
    for step in range(7):
        scale = (kept.abs().amax(1, keepdim=True) * (1 - 0.05 * step) / 7.5).clamp_min(1e-8)
        error = torch.clamp(torch.round(kept / scale), -8, 7) * scale - kept
        scales.append(scale[:, 0])
        errors.append((error**2 * importance).sum(1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(scales).gather(0, best)[0].half().float()


def convert(source: Path, ids: Tensor, solver: Solver, *, drift: bool, together: bool) -> SolvedWeights:
    """Solve stage after stage, each with the inputs that the solved ones before leave it.

    `drift` counts the inputs' errors in; `together` solves the linears of a stage as one matrix.
    """
    weights = SolvedWeights(Checkpoint.open(source))
    model = BlockModel(weights, CPU, fast=False)
    hidden, original = HiddenStates(model, ids), HiddenStates(model, ids)
    for number in range(len(model)):
        sums: dict[Stage, Sums] = {}

        def solve(stages: Sequence[Stage], number: int = number, sums: dict = sums) -> None:
            (stage,) = stages
            found = sums.pop(stage)
            hessian = found.hessian()
            linears = [f"{model.name(number)}.{name}" for name in stage]
            old = [model.model.get_parameter(f"{linear}.weight") for linear in linears]
            todo = [torch.cat(old)] if together else old
            if drift:
                todo = [
                    compensated(
                        weight[None],
                        Factor(hessian[None].clone(), DAMPING),
                        found.wanted(weight, Share())[None],
                        tokens=[found.tokens],
                    )[0]
                    for weight in todo
                ]
            new = torch.cat([solver(weight, hessian) for weight in todo]).split([len(w) for w in old])
            for linear, weight in zip(linears, new, strict=True):
                model.replace(linear, weight)
                weights.solved[f"{linear}.weight"] = weight.contiguous()

        block = model.load(number)
        walk = _walk(model, hidden, block, number, solve)
        beside = _walk(model, original, model.unchanging(block), number, None) if drift else repeat(None)
        for one, before in zip(walk, beside, strict=drift):
            sums.setdefault(one.stage, Sums(None)).add(one, before, bf16_units=False)
        model.unload(number)
    return weights


def _walk(
    model: BlockModel, hidden: HiddenStates, block: nn.Module, number: int, solve: Callable | None
) -> Iterator[Reached]:
    walk = BlockWalk(
        block, model.structure.parts[number], len(hidden), lambda i: hidden.forward(i, block, number),
        solve, keep_bytes=4 << 30, dtype=torch.float32,
    )  # fmt: skip
    return walk.reach(model.structure.stages(number), hidden.put)


# solver, whether the drift of the inputs is counted in
ROWS: dict[str, tuple[Solver, bool]] = {
    "joint": (partial(reference, joint=True), False),
    "separate": (partial(reference, joint=False), False),
    "ours": (ours, True),
    "no-drift": (ours, False),
    "no-drift:sparsegpt": (partial(ours, rule="sparsegpt"), False),
    "no-drift:no-sweeps": (partial(ours, sweeps=0), False),
    "sparsegpt": (partial(ours, rule="sparsegpt"), True),
    "wanda": (partial(ours, rule="wanda"), True),
    "magnitude": (partial(ours, rule="magnitude"), True),
    "4-sweeps": (partial(ours, sweeps=4), True),
}


@torch.no_grad()
def main() -> None:
    """Print a row for every procedure, and what ours is of the reference's better variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--rows", default=",".join(ROWS))
    chosen = parser.parse_args()
    tokenizer = load_tokenizer(Source(chosen.model, chosen.model.name, None))
    ids = calibrate(tokenizer, "builtin", samples=chosen.samples, length=chosen.length, seed=0).ids
    held_out = calibrate(
        tokenizer, chosen.text, samples=chosen.held_out, length=chosen.length, seed=0, held_out=True
    ).ids
    print(f"{chosen.model.name}, {chosen.samples} x {chosen.length} tokens, load {os.getloadavg()[0]:.1f}")
    divergence = {}
    for name in chosen.rows.split(","):
        solver, drift = ROWS[name]
        started = time.process_time()
        weights = convert(chosen.model, ids, solver, drift=drift, together=name not in ("joint", "separate"))
        seconds = time.process_time() - started
        pair = [
            BlockModel(found, CPU, fast=False) for found in (Weights(Checkpoint.open(chosen.model)), weights)
        ]
        found = compare(pair[0], pair[1], held_out)
        if not divergence:
            print(f"{'original':20} perplexity {found.source_perplexity:7.4f}")
        divergence[name] = found.divergence
        print(
            f"{name:20} perplexity {found.perplexity:7.4f}  KL {found.divergence:.4f}  "
            f"top-1 {found.agreement:.4f}  CPU s {seconds:6.1f}",
            flush=True,
        )
    if {"joint", "separate", "ours"} <= divergence.keys():
        best = min(divergence["joint"], divergence["separate"])
        print(f"KL, ours / better reference: {divergence['ours'] / best:.3f}")


if __name__ == "__main__":
    main()
