"""Walk one decoder block stage by stage, over all micro-batches, with as few forwards as memory allows.

A stage is the set of linears that read one input (q/k/v, o, gate/up, down). Its Hessian needs that input for
every micro-batch, computed with all earlier stages already quantized. So a micro-batch is run through the
block once per stage, as far as that stage, where its forward is broken off. What that would compute again is
kept instead, while it fits the memory limit:

- the input of a part's last linear (o, down): the part's output is then one product away;
- the output of a finished part (attention): it takes the part's place in later runs.

With both kept, everything but norms and residual sums is computed exactly once: one forward in all. A
micro-batch that does not fit is run again from the block's input; the numbers are the same.

Experts are walked some at a time, with all of the text that goes to them and not by micro-batches: what
enters them is kept together, so that an expert's tokens are picked out of it at once. Their outputs are
computed again when all are solved, by micro-batches as in any forward: the numbers are those of a run that
was stopped after the block and goes on. Where several processes take pieces of a text through a model the
experts are divided among them (divided.py): each walks its own, with the text of all, and outputs are
computed of all of it at once and kept.

Compared before choosing (forwards per block, of an 8B model): replay alone 2.1; suspending every
micro-batch's forward on a thread of its own 1.0, but a stopped forward holds every local of the frames it is
stopped in, twice to four times what is kept here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from marlin_convert.errors import SourceError
from marlin_convert.models.divided import Called, Processes, answered, gathered, rounds
from marlin_convert.models.experts import HANDED, Experts, routed
from marlin_convert.models.routing import Chosen, Entering, chosen
from marlin_convert.models.structure import Part, Stage


class _BrokenOff(BaseException):
    """Breaks off a forward at the stage it was run for; a BaseException so that no model code catches it."""

    def __init__(self, x: Tensor):
        self.x = x


class _Entered(BaseException):
    """Breaks off a forward at the experts: with what they are called with, and their output if they ran."""

    def __init__(self, called: Called, output: Tensor | None):
        self.called, self.output = called, output


@dataclass(frozen=True)
class Reached:
    """What a micro-batch brings to a stage: x (..., k).

    Where the stage is the last of a part that is added to a `residual`, also that, over its multiplier; in a
    block in which nothing is solved the stage's `output` (..., n) too, and the `norm` that it goes through
    before it is added. `routed` of the rows go to the expert that the stage is of; None where it is of no
    expert.
    """

    stage: Stage
    x: Tensor
    residual: Tensor | None = None
    output: Tensor | None = None
    norm: nn.Module | None = None
    routed: int | None = None


class BlockWalk:
    """The walk of all micro-batches through one block.

    `forward(i)` computes the block's output of micro-batch i; `solve(stages)` replaces the weights of the
    stages' linears, once all micro-batches have reached them: one stage, or the same of `at_once` experts.
    Without `solve` the block stays as it is but for its experts: they see the tokens that go to them in the
    walk `beside` it, and their weights are given up one after another. At most about `keep_bytes` of
    activations are kept, in `dtype`; what enters experts is kept beyond that, and what those of an unchanged
    block give, or any that are divided.

    Where other `processes` walk with other pieces of a text, each has the weights of some experts only. The
    walks of all come to the same places in the same order: `solve` is called as often for experts, of none
    where one has fewer.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: Sequence[Part],
        batches: int,
        forward: Callable[[int], Tensor],
        solve: Callable[[Sequence[Stage]], None] | None,
        *,
        keep_bytes: int,
        dtype: torch.dtype,
        at_once: int = 1,
        beside: "BlockWalk | None" = None,
        processes: Processes | None = None,
    ):
        self.block = block
        self.parts = parts
        self.batches = batches
        self.replayed = 0  # times that a part was computed again because nothing of it was kept
        self._forward = forward
        self._solve = solve
        self._room = keep_bytes
        self._dtype = dtype
        self._at_once = at_once
        self._beside = beside
        self._processes = processes
        self._entering: Entering | None = None
        self._computed = dtype
        self._rows: list[int] = []  # of every micro-batch that enters the experts
        self._current = 0
        self._stages: Sequence[Stage] = ()
        self._inputs: dict[int, Tensor] = {}  # of the last stage of the part being walked, by micro-batch
        self._outputs: dict[tuple[str, int], Tensor] = {}  # of finished parts

    @torch.no_grad()
    def reach(
        self, stages: Sequence[Stage], finish: Callable[[int, Tensor], None]
    ) -> Iterator[Reached | None]:
        """What every micro-batch brings to every one of `stages`, in order.

        `finish(i, output)` takes the block's output of every micro-batch. Two blocks can be walked side by
        side: None comes where both must be before either goes on.
        """
        self._stages = stages
        with self._finished_parts() as finished:
            for part in self.parts:
                if part.experts and (self._processes or any(stage in stages for stage in part.stages)):
                    yield from self._walk_experts(part)
                    finished(part)
                    continue
                for stage in () if part.experts else part.stages:
                    if stage in stages:
                        yield from self._walk_stage(
                            stage, part if part.module and stage == part.last else None
                        )
                if part.module and not part.experts:
                    finished(part)
            for i in range(self.batches):
                self._current = i
                finish(i, self._forward(i))

    def _walk_stage(self, stage: Stage, part: Part | None) -> Iterator[Reached]:
        """Run every micro-batch to a stage, the last one of `part` if that is given."""
        for i in range(self.batches):
            self._current = i
            # the first one tells whether the model does what was found without values
            with self._broken_off_at(stage, confirm=i == 0) as called, self._added_to(part) as read:
                try:
                    self._forward(i)
                except _BrokenOff as reached:
                    x = reached.x.to(self._dtype)
                    reached.__traceback__ = None  # it holds every local of the forward
                else:
                    never = next(name for name in stage if name not in called)
                    raise SourceError(
                        f"{never} of {type(self.block).__name__} is not called with this text; of the "
                        f"{len(stage)} linears that should read one input {len(called)} are.",
                        "its model computes otherwise than was found; leave these linears dense with --skip.",
                    )
            residual = read.pop() if read else None
            if part is None:
                yield Reached(stage, x)
            elif self._solve is None:
                output = self.block.get_submodule(stage[0])(x).to(self._dtype)
                if self._fits(output):
                    self._outputs[part.module, i] = output
                path = part.residual.norm if part.residual else ""
                yield Reached(stage, x, residual, output, self.block.get_submodule(path) if path else None)
                del output
            else:
                if self._fits(x):
                    self._inputs[i] = x
                yield Reached(stage, x, residual)
            del x, residual
        if self._solve is not None:
            self._solve([stage])

    def _walk_experts(self, part: Part) -> Iterator[Reached | None]:
        """Solve some experts after others, each with all the tokens that go to it."""
        experts = self.block.get_submodule(part.module)
        assert isinstance(experts, Experts)
        called, outputs = self._called(experts, part.module)
        entering = self._entering = Entering(
            called.x, [own for own, _ in routed(called.index, experts.count)]
        )
        if self._processes and self._solve is None:
            outputs = self._answered(experts, called)
        ways = self._beside._entering if self._beside else entering
        assert ways is not None
        if self._processes:  # which may have no experts to stay with
            yield None
        for numbers in self._some_at_a_time(part):
            first, last = ({number: part.stages[2 * number + i] for number in numbers} for i in (0, 1))
            if self._processes or any(stage in self._stages for stage in (*first.values(), *last.values())):
                yield from self._walk_some(experts, ways, first, last)
            if self._solve is None:
                for number in numbers:
                    experts.get_submodule(str(number)).to("meta")
        self._entering = None
        if self._processes and self._solve is not None:
            outputs = self._answered(experts, called)
        self._outputs.update(((part.module, i), output) for i, output in enumerate(outputs))

    def _some_at_a_time(self, part: Part) -> Iterable[range]:
        """The numbers of the experts that are walked at once, if any are."""
        if not any(stage in self._stages for stage in part.stages):
            return ()
        if self._processes:
            return rounds(self._processes, part.experts, self._at_once)
        every = range(part.experts)
        return (every[start : start + self._at_once] for start in every[:: self._at_once])

    def _answered(self, experts: Experts, called: Called) -> Sequence[Tensor]:
        """What experts that are divided answer to every micro-batch of this process."""
        assert self._processes
        return answered(self._processes, experts, called, self._computed).split(self._rows)

    def _walk_some(
        self, experts: Experts, ways: Entering, first: dict[int, Stage], last: dict[int, Stage]
    ) -> Iterator[Reached]:
        """Solve the `first` stages of some experts by number, and then the `last`."""
        entering = self._entering
        assert entering is not None
        pieces = [(number, piece) for number in first for piece in chosen(ways, number)]
        for number, piece in pieces:
            if first[number] in self._stages:
                yield self._of_expert(first[number], entering.x[piece.tokens], piece)
        self._solve_of(first.values())
        inner = experts.inner(
            entering.x, [(number, piece.tokens) for number, piece in pieces], self._computed
        )
        for (number, piece), x in zip(pieces, inner, strict=True):
            if last[number] in self._stages:
                yield self._of_expert(last[number], x, piece)
        self._solve_of(last.values())

    def _solve_of(self, experts: Iterable[Stage]) -> None:
        """Solve the stages of experts, but for those that are passed over."""
        stages = [stage for stage in experts if stage in self._stages]
        if self._solve is not None and (stages or self._processes):
            self._solve(stages)

    def _of_expert(self, stage: Stage, x: Tensor, piece: Chosen) -> Reached:
        return Reached(stage, x if piece.own else x * piece.weight, routed=len(x) if piece.own else 0)

    def _called(self, experts: Experts, path: str) -> tuple[Called, Sequence[Tensor]]:
        """What experts are called with, all micro-batches as one; their answers to each if they are final.

        Where they are divided it is what all processes call theirs with, and nothing is answered yet.
        """
        answers = self._solve is None and not self._processes

        def broken_off(_: nn.Module, args: Any, kwargs: Any, output: Tensor | None = None) -> NoReturn:
            given = dict(zip(HANDED, args, strict=False)) | kwargs
            raise _Entered(Called(*(given[name] for name in HANDED)), output)

        if answers:
            hook = experts.register_forward_hook(broken_off, with_kwargs=True)
        else:
            hook = experts.register_forward_pre_hook(broken_off, with_kwargs=True)
        x, ways, outputs, tokens = torch.empty(0), [], [], 0
        self._rows = []
        try:
            for i in range(self.batches):
                self._current = i
                entered = self._broken_off_at_experts(i, path)
                called = entered.called
                if i == 0:  # the others are of its size, but for the last
                    self._computed, size = (
                        called.x.dtype,
                        (self.batches * len(called.x), *called.x.shape[1:]),
                    )
                    x = called.x.new_empty(size, dtype=self._dtype)
                x[tokens : tokens + len(called.x)] = called.x
                tokens += len(called.x)
                self._rows.append(len(called.x))
                ways.append((called.index, called.shares))
                if entered.output is not None:
                    outputs.append(entered.output)
        finally:
            hook.remove()
        index, shares = (torch.cat(of_all) for of_all in zip(*ways, strict=True))
        called = Called(x[:tokens], index, shares)
        return (gathered(self._processes, called) if self._processes else called), outputs

    def _broken_off_at_experts(self, i: int, path: str) -> _Entered:
        try:
            self._forward(i)
        except _Entered as entered:
            entered.__traceback__ = None
            return entered
        raise SourceError(
            f"{path} of {type(self.block).__name__} is not called with this text.",
            "its model computes otherwise than was found; leave its experts dense with --skip.",
        )

    @contextmanager
    def _added_to(self, part: Part | None) -> Iterator[list[Tensor]]:
        """Filled with what the output of a part will be added to, where that is known."""
        found: list[Tensor] = []
        if part is None or part.residual is None:
            yield found
            return
        multiplier = part.residual.multiplier

        def read(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            found[:] = [x if multiplier == 1 else x / multiplier]

        reader = self.block.get_submodule(part.residual.module)
        hook = reader.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()

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
                raise _BrokenOff(x)

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

            def sum_of_experts(*args: Any, **kwargs: Any) -> Any:
                output = self._outputs.get((part.module, self._current))
                if output is None:
                    output = whole(*args, **kwargs)
                    if part is not self.parts[-1] and self._fits(output):
                        self._outputs[part.module, self._current] = output
                return output.clone()  # blocks add to it in place

            if part.experts:
                module.forward = sum_of_experts
                replaced.append(module)
                return
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
