"""The codes of a source that is already quantized, untouched."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue

import torch
from torch import Tensor

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.codes import Packed, Tuned, pack
from marlin_convert.matrix import Fate
from marlin_convert.plan import Plan

# Linears of a repack in work at once, where there are as many processors: hashing keeps up with no more.
WORKERS = 4


class Repack:
    """The codes of a source that is already quantized, untouched.

    A few linears are read and packed ahead of the one asked for. Inside its context torch uses one thread for
    every operation: threads that share one wait for each other, and on a busy machine do little else.
    """

    replayed = 0
    divergence: float | None = None
    tuned: Tuned | None = None

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
            return pack(fate, layer, self._plan, fate.row(), memory[1])
        finally:
            self._memory.put(memory)
