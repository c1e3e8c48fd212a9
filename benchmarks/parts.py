"""A conversion with every part of its work timed: the GPU is waited for around each.

Of several ranks each has its times. Before they tell each other something they meet, so that waiting for the
others is one part and what moves another; sums that overlap with other work are waited for too.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

import marlin_convert.codes as codes
import marlin_convert.commands.quantize as story
import marlin_convert.solve as solve
import marlin_convert.solvers.drift as drift
import marlin_convert.solvers.factor as factor
import marlin_convert.solvers.gptq as gptq
import marlin_convert.stage_solver as stage_solver
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.experts import Experts
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.stages import BlockWalk
from marlin_convert.quantized import QuantizedLinear
from marlin_convert.ranks import Ranks
from marlin_convert.solvers.hessian import Hessian

PARTS: tuple[tuple[Any, str, str], ...] = (
    (HiddenStates, "forward", "forwards"),
    (Experts, "sum_of", "experts answer"),
    (Experts, "inner", "experts up to their last linear"),
    (HiddenStates, "divergence", "divergence"),
    (Hessian, "add", "hessians: products"),
    (Hessian, "mean", "hessians: mirror"),
    (stage_solver, "_batch", "hessians: side by side"),
    (drift.Products, "add", "drift: products"),
    (solve.Sums, "wanted", "drift: wanted"),
    (factor, "_reorder", "order"),
    (stage_solver, "compensated", "drift: regression"),
    (gptq, "solve_batch", "solve: rest"),
    (gptq, "search_scales", "solve: scale search"),
    (factor, "factorise", "cholesky"),
    (gptq, "_descent", "solve: descent matrix"),
    (gptq, "sweep", "solve: sweeps"),
    (stage_solver, "_energies", "error"),
    (QuantizedLinear, "dequantize", "dequantize"),
    (BlockModel, "unchanging", "copy of the block"),
    (codes, "pack", "pack and compare"),
    (codes, "pack_as_one", "pack and compare"),
    (story, "_dense", "dense tensors"),
    (BlockModel, "load", "wait for the next block"),
    (BlockModel, "load_outside", "model outside blocks"),
    (BlockModel, "replace", "dequantized weights in"),
    (HiddenStates, "__init__", "embed"),
    (story.ShardWriter, "write", "hand to writer"),
    (story.ShardWriter, "close", "wait for disk"),
)
MEETINGS = (
    (Ranks, "_wait_for", "ranks: sums, inputs of experts"),
    (Ranks, "exchange", "ranks: codes, packed tensors"),
    (Ranks, "all_say", "ranks: words"),
)


class Times:
    """Seconds spent in every part, without those inside of it."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self) -> None:
        """Time the parts from now on, and what the walk does between them: mostly inputs of experts."""
        meet = Ranks.all_say

        def met(ranks: Ranks) -> None:
            if not ranks.alone:
                self._timed("ranks: wait for the others", lambda: meet(ranks, None))

        for owner, name, label in PARTS:
            self._watch(owner, name, label)
        for owner, name, label in MEETINGS:
            self._watch(owner, name, label, met)
        reach = BlockWalk.reach

        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            walk, end = reach(*args, **kwargs), object()
            while (one := self._timed("walk: rest", lambda: next(walk, end))) is not end:
                yield one

        BlockWalk.reach = steps  # type: ignore[method-assign]

    def _watch(self, owner: Any, name: str, label: str, before: Callable[[Any], None] | None = None) -> None:
        whole = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(args[0])
            return self._timed(label, lambda: whole(*args, **kwargs))

        setattr(owner, name, watched)

    def _timed(self, label: str, call: Callable[[], Any]) -> Any:
        self._wait()
        started, before = time.perf_counter(), sum(self.spent.values())
        try:
            return call()
        finally:
            self._wait()
            inside = sum(self.spent.values()) - before
            self.spent[label] += time.perf_counter() - started - inside

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def convert(job: story.Job) -> tuple[list[tuple[str, float]], float]:
    """Convert, in this process; seconds a layer of every part, the longest first, and of the whole.

    Without the first layer, in which kernels are compiled and the allocator warms up.
    """
    times = Times(job.device)
    times.watch()
    marks: list[tuple[float, dict[str, float]]] = []
    _convert_and_note(job, lambda: marks.append((time.perf_counter(), dict(times.spent))))
    (started, before), (ended, after) = marks[1], marks[-1]
    layers = len(marks) - 2
    each = {label: (after[label] - before.get(label, 0.0)) / layers for label in after}
    return sorted(each.items(), key=lambda one: -one[1]), (ended - started) / layers


def seconds(job: story.Job) -> list[float]:
    """Convert, in this process, with nothing else timed; the seconds of every layer."""
    ended: list[float] = []
    _convert_and_note(job, lambda: ended.append(time.perf_counter()))
    return [end - start for start, end in pairwise(ended)]


def _convert_and_note(job: story.Job, note: Callable[[], None]) -> None:
    """Convert; `note` is called as the first block begins and as every block ends.

    A block ends when the text has gone on: what it gives is waited for.
    """
    block, begun = solve.Solve.block, False

    def marked(solver: solve.Solve, number: int) -> Iterator[Any]:
        nonlocal begun
        if not begun:
            begun = True
            note()
        yield from block(solver, number)
        note()

    solve.Solve.block = marked  # type: ignore[method-assign]
    story.quantize(job)


def table(parts: list[tuple[str, float]], whole: float) -> str:
    """Lines of what `convert` returns; what is in no part is the whole less their sum."""
    return table_of_ranks([(parts, whole)])


def table_of_ranks(found: list[tuple[list[tuple[str, float]], float]]) -> str:
    """The same of several ranks, side by side."""
    columns = [dict(parts) | {"sum": sum(dict(parts).values()), "wall": wall} for parts, wall in found]
    labels = dict.fromkeys(label for column in columns for label in column if label not in ("sum", "wall"))
    return "\n".join(
        f"  {label:28}" + "".join(f" {column.get(label, 0.0):7.3f}" for column in columns)
        for label in (*labels, "sum", "wall")
        if any(column.get(label, 0.0) > 0.0005 for column in columns)
    )
