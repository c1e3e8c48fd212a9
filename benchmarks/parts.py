"""A conversion with every part of its work timed: the GPU is waited for around each."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import marlin_convert.commands.quantize as story
import marlin_convert.solve as solve
import marlin_convert.solvers.drift as drift
import marlin_convert.solvers.gptq as gptq
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.stages import BlockWalk
from marlin_convert.quantized import QuantizedLinear
from marlin_convert.solvers.hessian import Hessian

PARTS: tuple[tuple[Any, str, str], ...] = (
    (HiddenStates, "forward", "forwards"),
    (HiddenStates, "divergence", "divergence"),
    (Hessian, "add", "hessians: products"),
    (Hessian, "mean", "hessians: mirror"),
    (solve, "_batch", "hessians: side by side"),
    (drift.Products, "add", "drift: products"),
    (solve.Sums, "wanted", "drift: wanted"),
    (solve, "compensated", "drift: regression"),
    (drift, "factorise", "drift: cholesky"),
    (gptq, "solve_batch", "solve: rest"),
    (gptq, "search_scales", "solve: scale search"),
    (gptq, "factorise", "solve: cholesky"),
    (gptq, "_descent", "solve: descent matrix"),
    (gptq, "sweep", "solve: sweeps"),
    (solve, "_energies", "error"),
    (QuantizedLinear, "dequantize", "dequantize"),
    (BlockModel, "unchanging", "copy of the block"),
    (solve, "pack", "pack and compare"),
    (story, "_dense", "dense tensors"),
    (BlockModel, "load", "wait for the next block"),
    (BlockModel, "load_outside", "model outside blocks"),
    (BlockModel, "replace", "dequantized weights in"),
    (HiddenStates, "__init__", "embed"),
    (story.ShardWriter, "write", "hand to writer"),
    (story.ShardWriter, "close", "wait for disk"),
)


class Times:
    """Seconds spent in every part, without those inside of it."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self) -> None:
        """Time the parts from now on, and what the walk does between them: mostly inputs of experts."""
        for owner, name, label in PARTS:
            self._watch(owner, name, label)
        reach = BlockWalk.reach

        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            walk = reach(*args, **kwargs)
            while (one := self._timed("walk: rest", lambda: next(walk, None))) is not None:
                yield one

        BlockWalk.reach = steps  # type: ignore[method-assign]

    def _watch(self, owner: Any, name: str, label: str) -> None:
        whole = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: self._timed(label, lambda: whole(*args, **kwargs)))

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
    marks = []

    def progress(numbers: range, total: int) -> Iterable[int]:
        for number in numbers:
            marks.append((time.perf_counter(), dict(times.spent)))
            yield number
        marks.append((time.perf_counter(), dict(times.spent)))

    story.quantize(job, progress)
    (started, before), (ended, after) = marks[1], marks[-1]
    layers = len(marks) - 2
    each = {label: (after[label] - before.get(label, 0.0)) / layers for label in after}
    return sorted(each.items(), key=lambda one: -one[1]), (ended - started) / layers


def table(parts: list[tuple[str, float]], whole: float) -> str:
    """Lines of what `convert` returns; what is in no part is the whole less their sum."""
    named = [*parts, ("sum", sum(seconds for _, seconds in parts)), ("wall", whole)]
    return "\n".join(f"  {label:28} {seconds:7.3f}" for label, seconds in named if seconds > 0.0005)
