"""Walk one decoder block stage by stage, over all micro-batches, with as few forwards as memory allows.

A stage is the set of linears that read one input (q/k/v, o, gate/up, down). Its Hessian needs that input for
every micro-batch, computed with all earlier stages already quantized. So a micro-batch is run through the
block once per stage, as far as that stage, where its forward is broken off. What that would compute again is
kept instead, while it fits the memory limit:

- the input of a part's last linear (o, down): the part's output is then one product away;
- the output of a finished part (attention): it takes the part's place in later runs.

With both kept, everything but norms and residual sums is computed exactly once: one forward in all. A
micro-batch that does not fit is run again from the block's input; the numbers are the same.

Compared before choosing (forwards per block, of an 8B model): replay alone 2.1; suspending every
micro-batch's forward on a thread of its own 1.0, but a stopped forward holds every local of the frames it is
stopped in, twice to four times what is kept here.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.errors import SourceError
from marlin_convert.models.structure import Part, Stage


class _Reached(BaseException):
    """Breaks off a forward at the stage it was run for; a BaseException so that no model code catches it."""

    def __init__(self, x: Tensor):
        self.x = x


class BlockWalk:
    """The walk of all micro-batches through one block.

    `forward(i)` computes the block's output of micro-batch i; `observe(stage, x)` sees the input x (..., k)
    that every micro-batch brings to a stage; then `solve(stage)` replaces the weights of the stage's linears.
    At most about `keep_bytes` of activations are kept, in `dtype`.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: Sequence[Part],
        batches: int,
        forward: Callable[[int], Tensor],
        observe: Callable[[Stage, Tensor], None],
        solve: Callable[[Stage], None],
        *,
        keep_bytes: int,
        dtype: torch.dtype,
    ):
        self.block = block
        self.parts = parts
        self.batches = batches
        self.replayed = 0  # times that a part was computed again because nothing of it was kept
        self._forward = forward
        self._observe = observe
        self._solve = solve
        self._room = keep_bytes
        self._dtype = dtype
        self._current = 0
        self._stages: Sequence[Stage] = ()
        self._inputs: dict[int, Tensor] = {}  # of the last stage of the part being walked, by micro-batch
        self._outputs: dict[tuple[str, int], Tensor] = {}  # of finished parts

    def run(self, stages: Sequence[Stage], finish: Callable[[int, Tensor], None]) -> None:
        """Solve `stages`, in order; `finish(i, output)` takes the block's output of every micro-batch."""
        for stage, x in self.inputs(stages, finish):
            self._observe(stage, x)

    @torch.no_grad()
    def inputs(
        self, stages: Sequence[Stage], finish: Callable[[int, Tensor], None]
    ) -> Iterator[tuple[Stage, Tensor]]:
        """What `run` lets `observe` see, one after another: so two blocks can be walked side by side."""
        self._stages = stages
        with self._finished_parts() as finished:
            for part in self.parts:
                for stage in part.stages:
                    if stage in stages:
                        keep_inputs = bool(part.module) and stage == part.last
                        yield from self._walk_stage(stage, keep_inputs=keep_inputs)
                if part.module:
                    finished(part)
            for i in range(self.batches):
                self._current = i
                finish(i, self._forward(i))

    def _walk_stage(self, stage: Stage, *, keep_inputs: bool) -> Iterator[tuple[Stage, Tensor]]:
        for i in range(self.batches):
            self._current = i
            # the first one tells whether the model does what was found without values
            with self._broken_off_at(stage, confirm=i == 0) as called:
                try:
                    self._forward(i)
                except _Reached as reached:
                    x = reached.x.to(self._dtype)
                    reached.__traceback__ = None  # it holds every local of the forward
                else:
                    never = next(name for name in stage if name not in called)
                    raise SourceError(
                        f"{never} of {type(self.block).__name__} is not called with this text; of the "
                        f"{len(stage)} linears that should read one input {len(called)} are.",
                        "its model computes otherwise than was found; leave these linears dense with --skip.",
                    )
            if keep_inputs and self._fits(x):
                self._inputs[i] = x
            yield stage, x
            del x
        self._solve(stage)

    @contextmanager
    def _broken_off_at(self, stage: Stage, *, confirm: bool) -> Iterator[Collection[str]]:
        """Break a forward off at a stage; to `confirm`, at its last linear, if all have read one input."""
        found: dict[str, Tensor] = {}

        def reached(name: str, _: nn.Module, args: Any) -> None:
            x = found.setdefault(name, args[0])
            other = next(iter(found))
            if not _same(found[other], x):
                raise SourceError(
                    f"{name} of {type(self.block).__name__} reads another input than {other} with this text.",
                    "its model computes otherwise than was found; leave these linears dense with --skip.",
                )
            if not confirm or len(found) == len(stage):
                raise _Reached(x)

        hooks = [
            self.block.get_submodule(name).register_forward_pre_hook(partial(reached, name))
            for name in (stage if confirm else stage[:1])
        ]
        try:
            yield found.keys()
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _finished_parts(self) -> Iterator[Callable[[Part], None]]:
        """Gives the function that lets a finished part answer from what was kept; undone at the end."""
        replaced: list[nn.Module] = []

        def finish(part: Part) -> None:
            module = self.block.get_submodule(part.module)
            last = self.block.get_submodule(part.last[0])
            whole = module.forward
            inputs, self._inputs = self._inputs, {}

            def answer(*args: Any, **kwargs: Any) -> Any:
                i = self._current
                output = self._outputs.get((part.module, i))
                if output is None:
                    if i in inputs:
                        x = inputs.pop(i)
                        output = whole(x) if last is module else last(x)
                        self._room += x.nbytes
                    else:
                        output = whole(*args, **kwargs)
                        output = output[0] if part.pair else output
                        self.replayed += part.last in self._stages
                    kept = output.to(self._dtype)
                    if part is not self.parts[-1] and self._fits(kept):
                        self._outputs[part.module, i] = kept
                        output = kept
                output = output.to(_dtype_of(*args, *kwargs.values()))
                return (output, None) if part.pair else output

            module.forward = answer
            replaced.append(module)

        try:
            yield finish
        finally:
            for module in replaced:
                del module.forward

    def _fits(self, x: Tensor) -> bool:
        """Take room for x if there is any."""
        if x.nbytes > self._room:
            return False
        self._room -= x.nbytes
        return True


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, in the same memory or not."""
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _dtype_of(*handed: Any) -> torch.dtype:
    """The type of the hidden states a part was called with."""
    return next(x.dtype for x in handed if isinstance(x, Tensor) and x.is_floating_point())
