"""The codes that the solver finds for a dense source, one block after another."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.calibration import Calibration
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.unfinished import CHUNKS
from marlin_convert.chunks import Chunks, experts_at_once, in_several
from marlin_convert.codes import Packed, Tuned, pack_all, weight_of
from marlin_convert.matrix import Fate
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.memory import memory_for_activations
from marlin_convert.models.stages import BlockWalk, Reached
from marlin_convert.models.structure import Stage
from marlin_convert.plan import Plan
from marlin_convert.quantized import dequantized
from marlin_convert.ranks import Ranks, Share
from marlin_convert.stage_solver import Solved, StageSolver, kind_of
from marlin_convert.sums import Sums
from marlin_convert.together import Found, collected, exchange, packed_here, sum_up

log = logging.getLogger("marlin_convert")

# Weights whose codes are packed by all ranks at once: those of a block but its experts,
# if they are no more.
PACKED_AT_ONCE = 1 << 28


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
        ranks: Ranks,
    ):
        """Embed the calibration text: of several ranks each its share.

        `directory` is for hidden states that no memory can hold, and for what is solved of a large block; the
        first rank has it.
        """
        self._plan = plan
        self._ranks = ranks
        self._kept = directory / CHUNKS
        self._recipe = plan.recipe
        self._model = BlockModel(
            weights, device, dtype=plan.dtype, trust_remote_code=trust_remote_code,
            experts=ranks.share.range,
        )  # fmt: skip
        claimed = set(weights.sparse_linears(manifests.load(weights.checkpoint.directory)))
        self._solver = StageSolver(plan, self._model, claimed)
        ids = calibration.ids[ranks.share.slice(len(calibration.ids))]
        room = directory if ranks.first else None
        self._hidden = HiddenStates(self._model, ids, room)
        self._original = HiddenStates(self._model, ids, room) if plan.compensates else None
        self._model.unload_outside()
        self.replayed = 0
        self.divergence: float | None = None
        self.tuned: Tuned | None = None

    def skip(self, done: int, weight: Callable[[Fate], Tensor] | None = None) -> None:
        """Take the text through the blocks that an earlier run has finished, with the weights it found.

        The first rank has them, and tells the others.
        """
        plan, ranks = self._plan, self._ranks
        for number in range(done):
            log.debug("block %d was finished before, running the text through it", number)
            block = self._model.load(number)
            if self._original:
                self._go_through(self._original, block, number)
            for fate in plan.worked_on_in(number):
                own = None if weight is None else weight(fate).to(self._model.dtype)
                found = ranks.given(own, self._model.device)
                if self._has(fate):
                    self._model.replace(fate.name, found)
            self._go_through(self._hidden, block, number)
            self._model.unload(number)

    def _has(self, fate: Fate) -> bool:
        """Whether this rank has a matrix of the loaded block: of experts each has some."""
        return not self._model.model.get_parameter(f"{fate.name}.weight").is_meta

    def _go_through(self, hidden: HiddenStates, block: nn.Module, number: int) -> None:
        """Take hidden states through a block as it is."""
        if self._ranks.alone:
            hidden.advance(block, number)
            return
        for _ in self._walk(hidden, block, number, None).reach((), hidden.put):
            pass

    def block(self, number: int) -> Iterator[Packed]:
        """Every matrix of a block that is worked on, solved and packed, or as an earlier run has kept it.

        Of several ranks the first one gets them. They keep nothing of a block that is not finished.
        """
        if not self._ranks.alone:
            yield from self._block_of_all(number)
            return
        chunks = Chunks(self._kept / str(number))
        kept = in_several(self._plan, number, self._model.device)
        yield from chunks.earlier()
        for alike in self.solved(number, chunks.earlier()):
            packed: list[Packed] = []
            for one in self._packed(alike):
                yield one
                packed.append(one)
            if kept:
                chunks.add(packed)

    def _block_of_all(self, number: int) -> Iterator[Packed]:
        """The same of several ranks.

        What all of them have is packed when there is so much that it divides evenly among them; of experts
        each packs its own.
        """
        ranks, device = self._ranks, self._model.device
        waiting: list[Solved] = []
        packed: list[Packed] = []

        def pack_waiting() -> None:
            here = packed_here(ranks, waiting, [one.fate.k * one.fate.n for one in waiting])
            waiting.clear()
            packed.extend(collected(ranks, list(self._packed(here)), device))

        def gather(alike: list[Solved], divided: bool) -> None:
            if divided:
                if waiting:  # the first rank writes it before any expert
                    pack_waiting()
                of_all = collected(ranks, list(self._packed(alike)), device)
                for _, row in of_all:
                    self._say(row)
                packed.extend(of_all)
                return
            waiting.extend(alike)
            if sum(one.fate.k * one.fate.n for one in waiting) > PACKED_AT_ONCE:
                pack_waiting()

        for _ in self.solved(number, then=gather):
            yield from packed
            packed.clear()
        pack_waiting()
        yield from packed

    def _say(self, row: dict[str, Any]) -> None:
        """Log what the manifest says of a matrix; warn if it did not go with the damping that was asked."""
        name, asked = row["name"], self._recipe.damping
        damping = row.get("damping", asked)
        if damping is None:
            log.warning("%s: its Hessian could not be factorised; weights are rounded to nearest", name)
        elif damping > asked:
            log.warning("%s: its Hessian needed damping %g, not %g", name, damping, asked)
        log.debug("%s: relative output error %.4f", name, row["error"])

    def _packed(self, solved: list[Solved]) -> Iterator[Packed]:
        """Pack what was solved, which is taken from the list: codes leave the device while others follow."""
        matrices = [(one.fate, one.found, one.row) for one in solved]
        solved.clear()
        return pack_all(matrices, self._plan)

    def solved(
        self,
        number: int,
        earlier: Iterable[Packed] = (),
        then: Callable[[list[Solved], bool], None] = lambda alike, divided: None,
    ) -> Iterator[list[Solved]]:
        """Solve the block stage by stage, with the inputs that the stages before leave it.

        Those that are solved at once come together. The matrices that an `earlier` run has solved are taken
        as they are: they must be those that are solved first. `then` is given what comes as soon as it is
        solved, which is at the same place among the calls of all ranks, and whether it is `divided` among
        them or all have it; it comes when the text goes on.
        """
        model = self._model
        block = model.load(number)
        original = None if self._original is None else model.unchanging(block)
        stages = self._left(number, earlier)
        sums: dict[Stage, Sums] = {}
        solved: list[list[Solved]] = []

        def solve(alike: Sequence[Stage]) -> None:
            fates = [[self._plan.fates[f"{model.name(number)}.{name}"] for name in stage] for stage in alike]
            of_alike = [sums.pop(stage) for stage in alike]
            # of experts that are divided a rank may have none
            divided = not self._ranks.alone and all(self._is_of_expert(stage) for stage in fates)
            if self._ranks.alone or divided:
                found = self._solve(fates, of_alike)
            else:
                found = self._solve_together(fates[0], of_alike[0])
            solved.append(_with_errors(list(found)))
            for one in () if divided else solved[-1]:
                self._say(one.row)
            then(solved[-1], divided)

        walk = self._walk(self._hidden, block, number, solve)
        both: Iterable[tuple[Reached | None, Reached | None]]
        if self._original is None or original is None:
            both = ((one, None) for one in walk.reach(stages, self._hidden.put))
        else:
            beside = self._walk(self._original, original, number, None, walk)
            both = zip(
                walk.reach(stages, self._hidden.put), beside.reach(stages, self._original.put), strict=True
            )
        for one, before in both:
            while solved:
                yield solved.pop(0)
            if one is None:
                continue
            if one.stage not in sums:
                linear = block.get_submodule(one.stage[0])
                assert isinstance(linear, nn.Linear)
                sums[one.stage] = Sums(linear.bias)
            sums[one.stage].add(one, before, bf16_units=model.bf16_products)
        self.replayed += walk.replayed
        if original is not None:
            original.to("meta")  # its forwards refer to its modules: it would stay until Python finds that
        model.unload(number)
        if number == self._plan.blocks - 1 and not self._hidden.finite():
            raise self._solver.overflow(f"what {model.name(number)} gives is")
        if self._original is not None:
            self.divergence = float(f"{self._hidden.divergence(self._original, self._ranks.mean):.6g}")
        yield from solved

    def _left(self, number: int, earlier: Iterable[Packed]) -> list[Stage]:
        """Give a loaded block the weights that an `earlier` run has found; the stages that are left."""
        model, found = self._model, set()
        for tensors, row in earlier:
            fate = self._plan.fates[row["name"]]
            stored = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
            model.replace(fate.name, weight_of(fate, stored, self._plan).to(model.dtype))
            found.add(fate.name)
        if found:
            every = len(self._plan.worked_on_in(number))
            log.info("block %d: %d of its %d matrices were solved before", number, len(found), every)
        path = model.name(number)
        return [stage for stage in self._plan.stages(number) if f"{path}.{stage[0]}" not in found]

    def _walk(
        self,
        hidden: HiddenStates,
        block: nn.Module,
        number: int,
        solve: Callable[[Sequence[Stage]], None] | None,
        beside: BlockWalk | None = None,
    ) -> BlockWalk:
        model = self._model
        share = 2 if self._original else 1
        return BlockWalk(
            block, model.structure.parts[number], len(hidden), lambda i: hidden.forward(i, block, number),
            solve, keep_bytes=memory_for_activations(model.device) // share, dtype=model.dtype,
            at_once=experts_at_once(self._plan, number, model.device), beside=beside,
            processes=None if self._ranks.alone else self._ranks,
        )  # fmt: skip

    def _is_of_expert(self, stage: list[Fate]) -> bool:
        return self._plan.structure.part_of_experts(stage[0].name) is not None

    def _solve(self, stages: list[list[Fate]], sums: list[Sums]) -> Iterator[Solved]:
        """Solve the linears of stages that are alike, if any, and put what they become into the model."""
        if stages:
            for some in self._solver.find(stages, sums, Share()):
                yield from some

    def _solve_together(self, stage: list[Fate], sums: Sums) -> Iterator[Solved]:
        """The same of a stage that all ranks have: each solves a part, and learns what others have found."""
        sum_up(self._ranks, sums)
        found: list[Found] = []
        for some in self._solver.find([stage], [sums], self._ranks.share):
            found += [(one.found, one.row, one.energies, one.latents) for one in some]
        of_all = {one[1]["name"]: one for one in exchange(self._ranks, found, self._model.device)}
        # one kind after another, as one process solves them
        every = [Solved(fate, *of_all[fate.name]) for fate in sorted(stage, key=kind_of)]
        weights = dequantized([one.found for one in every if not isinstance(one.found, Tensor)])
        for one in reversed(every):
            weight = one.found if isinstance(one.found, Tensor) else weights.pop()
            self._model.replace(one.fate.name, weight.to(self._model.dtype))
        yield from every


def _with_errors(solved: list[Solved]) -> list[Solved]:
    """What was solved with its error, the root of what `_energies` gives as a share, to six digits."""
    # fetched at once: a GPU would be waited for every time
    energies = torch.stack([one.energies for one in solved]).tolist() if solved else []
    for one, (error, energy) in zip(solved, energies, strict=True):
        one.row["error"] = float(f"{(max(error, 0.0) / energy) ** 0.5:.6g}") if energy > 0 else 0.0
    return solved
