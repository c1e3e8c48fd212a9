"""Walk one decoder block stage by stage, over all micro-batches, with as few forwards as memory allows.

A stage is the set of linears that read one input (q/k/v, o, gate/up, down). Its Hessian needs that input for
every micro-batch, computed with all earlier stages already quantized. Each micro-batch's forward therefore
stops where it reaches the stage, hands over the input, and goes on once the stage is solved: one forward per
block and micro-batch in all. Forwards stop by waiting on a thread of their own, because only a stack of its
own lets unmodified model code be suspended in the middle. Only one of the threads runs at a time.

A forward that waits holds its activations. When those would pass the memory limit, the forward is dropped
after handing over its input, and a new one is run from the block's start for the next stage (a replay).
Both ways compute the same numbers.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.models.architectures import Stage


class _Dropped(BaseException):
    """Unwinds a waiting forward that will not go on; a BaseException so that no model code catches it."""


class Forward:
    """One block forward that stops at every stage it has been told to watch.

    `run` computes the block's output; while it runs, `StageHooks` calls `arrive` from the stage's linears.
    """

    def __init__(self, run: Callable[[], Tensor], device: torch.device):
        self._run = run
        self._device = device
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._drop = False
        self._stage: Stage | None = None
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._go.acquire()
        _running.forward = self
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with torch.no_grad():
                if not self._drop:
                    self._output = self._run()
        except _Dropped:
            pass
        except BaseException as error:  # handed to the thread that waits for this forward
            self._error = error
        finally:
            del self._run
            self._stage = self._input = None
            self._stopped.release()

    def arrive(self, stage: Stage, x: Tensor) -> None:
        """Stop at `stage` with its input `x`; returns when told to go on. Called inside the forward."""
        self._stage, self._input = stage, x
        self._stopped.release()
        self._go.acquire()
        self._input = None
        if self._drop:
            raise _Dropped

    def advance(self) -> tuple[Stage | None, Tensor]:
        """Run to the next stage: (stage, its input), or (None, the block's output) at the end."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        if self._stage is None:
            self._thread.join()
            assert self._output is not None
            return None, self._output
        assert self._input is not None
        return self._stage, self._input

    def drop(self) -> None:
        """Unwind the forward and free what it holds."""
        self._drop = True
        self._go.release()
        self._thread.join()


_running = threading.local()


class StageHooks:
    """Hooks on the linears of a block's stages that stop the running `Forward` at stages not yet solved."""

    def __init__(self, block: nn.Module, stages: Sequence[Stage]):
        self._open = set(stages)
        self._handles = []
        self._inputs: dict[Stage, int] = {}
        for stage in stages:
            for name in stage:
                hook = self._hook(stage, name)
                self._handles.append(block.get_submodule(name).register_forward_pre_hook(hook))

    def _hook(self, stage: Stage, name: str) -> Callable[[nn.Module, Any], None]:
        def reached(module: nn.Module, args: Any) -> None:
            x: Tensor = args[0]
            if name == stage[0]:
                if stage in self._open:
                    _running.forward.arrive(stage, x)
                self._inputs[stage] = x.data_ptr()
            elif self._inputs.get(stage) != x.data_ptr():
                raise RuntimeError(f"{name} does not read the input of {stage[0]}: its table row is wrong")

        return reached

    def solved(self, stage: Stage) -> None:
        """Let forwards pass `stage` from now on."""
        self._open.remove(stage)

    def remove(self) -> None:
        """Take the hooks off the block."""
        for handle in self._handles:
            handle.remove()


def walk(
    forwards: Sequence[Callable[[], Tensor]],
    block: nn.Module,
    stages: Sequence[Stage],
    observe: Callable[[Stage, Tensor], None],
    solve: Callable[[Stage], None],
    finish: Callable[[int, Tensor], None],
    *,
    keep_bytes: int,
    device: torch.device,
) -> int:
    """Take all micro-batches through `block`, stage by stage; returns how many forwards were run.

    `forwards[i]()` computes micro-batch i's block output. `observe(stage, x)` sees every micro-batch's input
    x (..., k) of a stage, then `solve(stage)` replaces the stage's weights; `finish(i, output)` takes the
    outputs. At most about `keep_bytes` of activations wait for the next stage; the rest is computed again.
    """
    hooks = StageHooks(block, stages)
    waiting: dict[int, Forward] = {}
    runs = 0

    def continued(i: int) -> Forward:
        nonlocal runs
        if i in waiting:
            return waiting.pop(i)
        runs += 1
        return Forward(forwards[i], device)

    try:
        for stage in stages:
            kept = 0
            for i in range(len(forwards)):
                forward = continued(i)
                at, x = forward.advance()
                if at != stage:
                    raise RuntimeError(f"the block reached {at} where its table says {stage}")
                observe(stage, x)
                # beside the stage's input a stopped forward holds the residual stream, counted at x's width
                held = 2 * x.numel() * x.element_size()
                if kept + held <= keep_bytes:
                    kept += held
                    waiting[i] = forward
                else:
                    del x
                    forward.drop()
            solve(stage)
            hooks.solved(stage)
        for i in range(len(forwards)):
            at, output = continued(i).advance()
            if at is not None:
                raise RuntimeError(f"the block reached {at} after its last stage")
            finish(i, output)
    finally:
        for forward in waiting.values():
            forward.drop()
        hooks.remove()
    return runs
