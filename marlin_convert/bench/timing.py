"""How long a product takes: CUDA graphs over cold weights, medians, and what the GPU can do at best."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from marlin_convert.bench.multipliers import CUBLAS, DENSE, SPARSE, Multiplier, Multiply, Weights, said
from marlin_convert.bench.shapes import Shape
from marlin_convert.errors import KernelError

# Largest relative error of a product, in the 2-norm, from that of the dequantized weights in float16.
LARGEST_ERROR = 1e-3

# Of a weight, by multiplier; every peer has as many as our dense kernel.
BITS = {one.name: one.bits for one in (CUBLAS, SPARSE)}

# Milliseconds that a cell is measured for, in 3 to 25 replays.
MEASURED = 12


@dataclass(frozen=True)
class Cell:
    """One batch size of one layer: microseconds and relative error by multiplier, and why some failed."""

    shape: Shape
    group_size: int
    batch: int
    us: dict[str, float]
    errors: dict[str, float]
    failed: dict[str, str]

    def speedup(self, name: str) -> float | None:
        """How many times as fast as cuBLAS float16; None where one of the two failed."""
        us, cublas = self.us.get(name), self.us.get(CUBLAS.name)
        return cublas / us if us and cublas else None

    @property
    def operations(self) -> int:
        """Floating-point operations of the product."""
        return 2 * self.batch * self.shape.k * self.shape.n

    def nbytes(self, name: str) -> float:
        """Bytes that a multiplier must move at least: activations, output, weights and their scales."""
        k, n = self.shape.k, self.shape.n
        groups = 1 if self.group_size == -1 else k // self.group_size
        bits = BITS.get(name, DENSE.bits)
        return bits * k * n / 8 + (2 * groups * n if bits < 16 else 0) + 2 * self.batch * (k + n)


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reached in the same run: bytes a second, and float16 operations a second."""

    bandwidth: float
    compute: float

    def least(self, cell: Cell, name: str) -> float:
        """Microseconds of a multiplier that runs at these; 2:4 has twice the operations."""
        compute = self.compute * (2 if name == SPARSE.name else 1)
        return 1e6 * max(cell.nbytes(name) / self.bandwidth, cell.operations / compute)

    def share(self, cell: Cell, name: str) -> float | None:
        """What part of its time a multiplier would take if it ran at these; None where it failed."""
        return self.least(cell, name) / cell.us[name] if name in cell.us else None


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls, one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def timed(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call: the median over replays of a graph of all of them."""
    graph = capture(calls)
    replay(graph)
    repeats = max(3, min(25, int(MEASURED / max(replay(graph), 1e-3))))
    return statistics.median(replay(graph) for _ in range(repeats)) * 1e3 / len(calls)


def bind(copies: Sequence[Multiply], x: Tensor, y: Tensor) -> list[Callable[[], object]]:
    """Calls that multiply x by each copy of the weights in turn."""
    return [partial(multiply, x, y) for multiply in copies]


def measure(
    shape: Shape,
    batches: Sequence[int],
    multipliers: Sequence[Multiplier],
    group_size: int,
    device: torch.device,
) -> Iterator[Cell]:
    """The cells of a layer, cuBLAS among them; every product is compared before it is timed.

    What a peer cannot do is in the cell, and so is what does not fit into the memory of the GPU. KernelError
    when a product of ours is wrong.
    """
    every = (CUBLAS, *multipliers)
    try:
        weights = Weights(shape.k, shape.n, group_size, device)
    except torch.cuda.OutOfMemoryError as error:
        for batch in batches:
            yield Cell(shape, group_size, batch, {}, {}, {one.name: said(error) for one in every})
        return
    ready: dict[Multiplier, list[Multiply]] = {}
    unready: dict[str, str] = {}
    for multiplier in every:
        try:
            ready[multiplier] = multiplier.prepare(weights)
        except multiplier.may_fail as error:
            unready[multiplier.name] = said(error)
    for batch in batches:
        cell = Cell(shape, group_size, batch, {}, {}, dict(unready))
        try:
            x, y = activations(weights, batch)
            expected = products(x, weights, ready)
        except torch.cuda.OutOfMemoryError as error:
            cell.failed.update({one.name: said(error) for one in ready})
            yield cell
            continue
        for multiplier, copies in ready.items():
            try:
                cell.errors[multiplier.name] = checked(
                    multiplier.name, copies[0](x, y), expected[multiplier.sparse]
                )
                cell.us[multiplier.name] = timed(bind(copies, x, y))
            except multiplier.may_fail as error:
                cell.failed[multiplier.name] = said(error)
        yield cell


def activations(weights: Weights, batch: int) -> tuple[Tensor, Tensor]:
    """Random activations (batch, k) and memory for their product (batch, n), float16."""
    device = weights.B[0].device
    x = torch.randn(batch, weights.k, dtype=torch.half, device=device)
    return x, torch.empty(batch, weights.n, dtype=torch.half, device=device)


def products(x: Tensor, weights: Weights, multipliers: Iterable[Multiplier]) -> dict[bool, Tensor]:
    """What is right: x times the first copy of the weights, and of those that are 2:4 if one is sparse."""
    return {
        sparse: x @ (weights.pruned if sparse else weights.plain[0]).t()
        for sparse in {one.sparse for one in multipliers}
    }


def checked(name: str, product: Tensor, expected: Tensor) -> float:
    """The relative error of a product; KernelError when it is too large for its time to mean anything."""
    norm = torch.linalg.vector_norm
    error = (norm(product - expected, dtype=torch.float32) / norm(expected, dtype=torch.float32)).item()
    if not error <= LARGEST_ERROR:
        m, n = product.shape
        raise KernelError(
            f"the product of {name} for {m} tokens and {n} outputs is {error:.1e} off, relative; at most "
            f"{LARGEST_ERROR} is right.",
            "a time means nothing then: check the GPU with 'marlin-convert verify --require-kernel'.",
        )
    return error


def ceilings() -> Ceilings:
    """What the current GPU reaches with what torch has for it."""
    return Ceilings(_bandwidth(), _compute())


def _bandwidth() -> float:
    """Bytes a second: the faster of copying 2 GiB and of reading them alone, as kernels read weights."""
    one, other = (torch.ones(1 << 29, device="cuda") for _ in range(2))
    copied = 2 * one.nbytes / timed([partial(one.copy_, other), partial(other.copy_, one)])
    summed = one.nbytes / timed([one.sum, other.sum])
    return max(copied, summed) * 1e6


def _compute() -> float:
    """Operations a second of cuBLAS, 8192 x 8192 float16; random, for zeros take less power."""
    x, weight, y = (torch.randn(8192, 8192, dtype=torch.half, device="cuda") for _ in range(3))
    return 2 * 8192**3 / timed([partial(torch.matmul, x, weight.t(), out=y)] * 4) * 1e6
