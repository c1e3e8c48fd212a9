"""Where the codes of a block come from: solved on calibration text, or kept from a quantized source.

Weights that are only pruned come the same way as codes.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from marlin_convert.calibration import Calibration
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.writer import ShardWriter
from marlin_convert.errors import FormatError, SourceError
from marlin_convert.matrix import Fate
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.memory import memory_for_activations
from marlin_convert.models.stages import BlockWalk
from marlin_convert.models.structure import Stage
from marlin_convert.plan import Plan
from marlin_convert.quantized import QuantizedLinear, first_crowded, quad_nonzeros, same_codes
from marlin_convert.solvers import gptq, sparsity
from marlin_convert.solvers.drift import Drift, compensated
from marlin_convert.solvers.gptq import Solution
from marlin_convert.solvers.hessian import Hessian

log = logging.getLogger("marlin_convert")

# Linears of a repack in work at once, where there are as many processors: hashing keeps up with no more.
WORKERS = 4

Packed = tuple[dict[str, Tensor], dict[str, Any]]  # tensors of a linear, and what the manifest says of it


class Codes(Protocol):
    """Where the codes of a block come from: solved, or unpacked from a quantized source."""

    replayed: int

    def block(self, number: int) -> Iterator[Packed]:
        """Every packed linear of a block."""
        ...


class Repack:
    """The codes of a source that is already quantized, untouched.

    A few linears are read and packed ahead of the one asked for. Inside its context torch uses one thread for
    every operation: threads that share one wait for each other, and on a busy machine do little else.
    """

    replayed = 0

    def __init__(self, plan: Plan, weights: Weights, done: int):
        """Begin with the linears of block `done`, in the order in which they are written."""
        self._plan = plan
        self._weights = weights
        fates = {fate.name: fate for number in range(done, plan.blocks) for fate in plan.worked_on_in(number)}
        order = dict.fromkeys(plan.owner[spec.name][0] for spec in plan.specs if spec.name in plan.owner)
        self._todo = iter([fates[linear] for linear in order if linear in fates])
        self._ahead: deque[Future[Packed]] = deque()
        self._threads = torch.get_num_threads()
        self._workers = min(WORKERS, self._threads)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="repack")
        largest = max((fate.k * fate.n for fate in fates.values()), default=0)
        # the codes of a linear and what was kept of it, and those it is checked with, for every one in work
        self._memory: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(self._workers):
            self._memory.put(torch.empty(2, 2 * largest, dtype=torch.uint8))

    def __enter__(self) -> "Repack":
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def block(self, number: int) -> Iterator[Packed]:
        """The linears of a block, each unpacked from the source's layout and packed in the plan's."""
        for _ in self._plan.worked_on_in(number):
            missing = self._workers + 1 - len(self._ahead)
            self._ahead.extend(self._pool.submit(self._repack, fate) for fate in islice(self._todo, missing))
            yield self._ahead.popleft().result()

    def _repack(self, fate: Fate) -> Packed:
        memory = self._memory.get()
        try:
            layer = self._weights.quantized(fate.name, memory[0])
            return _pack(fate, layer, self._plan, memory[1]), fate.row()
        finally:
            self._memory.put(memory)


class Solve:
    """The codes that the solver finds for a dense source, one block after another.

    Where weights are pruned, the original model walks beside the one that is made: what is solved for makes
    up for the drift of its inputs (solvers/drift.py).
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
        self._original: tuple[BlockModel, HiddenStates] | None = None
        # the method is one of pruning only: wanda and magnitude leave the weights they keep as they are
        if any(
            fate.packed or plan.recipe.method == "sparsegpt"
            for fate in plan.fates.values()
            if fate.layout.sparse
        ):
            original = BlockModel(weights, device, dtype=plan.dtype, trust_remote_code=trust_remote_code)
            self._original = original, HiddenStates(original, calibration.ids, directory)
        self.replayed = 0

    def skip(self, done: int, writer: ShardWriter) -> None:
        """Take the text through the blocks that an earlier run has finished, with the codes it wrote."""
        plan = self._plan
        for number in range(done):
            log.debug("block %d was finished before, running the text through it", number)
            block = self._model.load(number)
            for fate in plan.worked_on_in(number):
                stored = {suffix: writer.read(f"{fate.name}.{suffix}") for suffix in plan.suffixes(fate)}
                if fate.pruned:
                    weight = stored["weight"]
                else:
                    weight = plan.unpack(fate, stored).dequantize(self._model.dtype)
                self._model.replace(fate.name, weight)
            self._hidden.advance(block, number)
            self._model.unload(number)
            if self._original:
                original, before = self._original
                before.advance(original.load(number), number)
                original.unload(number)

    def block(self, number: int) -> Iterator[Packed]:
        """Solve the block stage by stage, with the inputs that the stages before leave it."""
        model = self._model
        path = model.name(number)
        stages = self._plan.stages(number)
        hessians: dict[Stage, Hessian] = {}
        drifts: dict[Stage, Drift] = {}
        solved: list[Packed] = []

        def observe(stage: Stage, x: Tensor) -> None:
            if stage not in hessians:
                hessians[stage] = Hessian(x.shape[-1], x.device, bf16_units=model.bf16_products)
            hessians[stage].add(x)

        def solve_stage(stage: Stage) -> None:
            drift = drifts.pop(stage).mean() if stage in drifts else None
            linears = [f"{path}.{name}" for name in stage]
            solved.extend(self._solve(linears, hessians.pop(stage).mean(), drift))

        walk = self._walk(model, self._hidden, number, observe, solve_stage)
        if self._original is None:
            walk.run(stages, self._hidden.put)
        else:
            original, before = self._original
            beside = self._walk(original, before, number, lambda *_: None, lambda _: None)
            pairs = zip(walk.inputs(stages, self._hidden.put), beside.inputs(stages, before.put), strict=True)
            for (stage, x), (_, x0) in pairs:
                observe(stage, x)
                drifts.setdefault(stage, Drift(x.shape[-1], x.device)).add(x, x0)
            original.unload(number)
        self.replayed += walk.replayed
        model.unload(number)
        if number == self._plan.blocks - 1 and not self._hidden.finite():
            raise self._overflow(f"what {path} gives is")
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
        model: BlockModel,
        hidden: HiddenStates,
        number: int,
        observe: Callable[[Stage, Tensor], None],
        solve: Callable[[Stage], None],
    ) -> BlockWalk:
        block = model.load(number)
        share = 2 if self._original else 1
        return BlockWalk(
            block, model.structure.parts[number], len(hidden), lambda i: hidden.forward(i, block, number),
            observe, solve, keep_bytes=memory_for_activations(model.device) // share, dtype=model.dtype,
        )  # fmt: skip

    def _solve(self, linears: list[str], hessian: Tensor, drift: Tensor | None) -> Iterator[Packed]:
        """Solve the linears of a stage and put what they have become into the model."""
        if not hessian.isfinite().all():
            raise self._overflow(f"the inputs of {linears[0]} are")
        fates = [self._plan.fates[linear] for linear in linears]
        # those of a kind as one matrix
        for kind in sorted({(fate.layout.sparse, fate.pruned) for fate in fates}):
            chosen = [fate for fate in fates if (fate.layout.sparse, fate.pruned) == kind]
            weights: list[Tensor] = [
                self._model.model.get_parameter(f"{fate.name}.weight") for fate in chosen
            ]
            if kind == (True, True):
                yield from self._prune(chosen, weights, hessian, drift)
            else:
                yield from self._quantize(chosen, weights, hessian, drift)

    def _quantize(
        self, fates: list[Fate], weights: list[Tensor], hessian: Tensor, drift: Tensor | None
    ) -> Iterator[Packed]:
        recipe, layout = self._recipe, fates[0].layout  # engines load a stage as one: it has one layout
        group_size = len(hessian) if layout.group_size == -1 else layout.group_size
        weight = torch.cat(weights)
        settings: dict[str, Any] = {
            "bits": layout.bits,
            "group_size": group_size,
            "damping": recipe.damping,
            "sweeps": recipe.sweeps,
        }
        if layout.sparse:
            mask = self._mask(fates, weights)
            if drift is not None:
                weight = compensated(weight, hessian, drift, damping=recipe.damping)
            found = sparsity.solve(weight, hessian, mask=mask, **settings)
        else:
            found = gptq.solve(weight, hessian, **settings)
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
            self._model.replace(fate.name, layer.dequantize(self._model.dtype))
            row = _row(fate, found, columns, recipe.damping)
            log.debug("%s: relative output error %.4f", fate.name, row["error"])
            yield _pack(fate, layer, self._plan), row

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

    def _prune(
        self, fates: list[Fate], weights: list[Tensor], hessian: Tensor, drift: Tensor | None
    ) -> Iterator[Packed]:
        recipe, weight = self._recipe, torch.cat(weights)
        if recipe.method == "sparsegpt":
            if drift is not None:
                weight = compensated(weight, hessian, drift, damping=recipe.damping).to(weight.dtype)
            pruned, _ = sparsity.prune(weight, hessian, damping=recipe.damping, sweeps=recipe.sweeps)
        else:
            mask = sparsity.choose_mask(weight, hessian, method=recipe.method, damping=recipe.damping)
            pruned = weight * mask.T
        for fate, old, new in zip(fates, weights, pruned.split([len(one) for one in weights]), strict=True):
            written = new.to(getattr(torch, fate.layout.dtype)).contiguous()
            self._model.replace(fate.name, written.to(self._model.dtype))
            squares = (
                gptq.output_energy(hessian, one.T) for one in (old.float() - written.float(), old.float())
            )
            error = _relative(*(one.sum().item() for one in squares))
            log.debug("%s: relative output error %.4f", fate.name, error)
            yield {f"{fate.name}.weight": written.cpu()}, fate.row() | {"error": error}


def _relative(error: float, energy: float) -> float:
    """||x E|| / ||x W|| from their squares, to six digits."""
    return float(f"{(max(error, 0.0) / energy) ** 0.5:.6g}") if energy > 0 else 0.0


def _row(fate: Fate, found: Solution, columns: slice, asked: float) -> dict[str, Any]:
    """What the manifest says of a solved matrix; `error` is ||x(W - W_q)|| / ||xW|| on the calibration."""
    error, energy = (one[columns].sum().item() for one in (found.error, found.energy))
    row = fate.row() | {"error": _relative(error, energy), "damping": found.damping}
    if found.damping is not None and found.damping > asked:
        log.warning("%s: its Hessian needed damping %g, not %g", fate.name, found.damping, asked)
    if found.damping is None:
        row["rounded_to_nearest"] = True
        log.warning("%s: its Hessian could not be factorised; weights are rounded to nearest", fate.name)
    return row


def _pack(fate: Fate, layer: QuantizedLinear, plan: Plan, memory: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a packed linear by full name; what was packed is unpacked again and compared.

    The codes it is compared with are put in `memory`, if that is given.
    """
    try:
        packed = plan.pack(fate, layer)
    except FormatError as error:
        hint = error.hint or f"leave it dense with --skip '{fate.name}'."
        raise FormatError(f"{fate.name}: {error}.", hint) from error
    again = plan.unpack(fate, packed, memory)
    if not (
        same_codes(again.codes, layer.codes)
        and torch.equal(again.scales.float(), layer.scales.float())
        and all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in ((again.zeros, layer.zeros), (again.group_of_row, layer.group_of_row))
        )
        and (again.kept is None or layer.kept is None or not bool((layer.kept & ~again.kept).any()))
    ):
        raise RuntimeError(
            f"{fate.name} does not survive {fate.layout.format}; this is a bug, nothing was published"
        )
    return {f"{fate.name}.{suffix}": tensor for suffix, tensor in packed.items()}
