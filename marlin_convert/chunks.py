"""The experts of a block, some at a time: how many, and what is kept of a large block until it is finished.

A chunk is as many experts as are solved at once. A block that is walked in several may take long, so what is
solved of it is kept on disk meanwhile, packed, for a run that is stopped to go on with inside of the block.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from marlin_convert.checkpoint.kept import keep, kept
from marlin_convert.codes import Packed
from marlin_convert.matrix import Fate
from marlin_convert.models.structure import Part
from marlin_convert.plan import Plan
from marlin_convert.solvers import gptq

log = logging.getLogger("marlin_convert")

# Bytes that the experts of a layer that are solved at once take on a device: never all of a layer's Hessians.
# It is not asked how much is free, for bits can depend on how many matrices are multiplied side by side.
AT_ONCE = {"cuda": 8 << 30, "cpu": 1 << 30}

# Seconds of work that may be lost. What is kept is written twice, and waited for: so little in so long a
# time is no burden. Of a layer of 256 experts a large GPU keeps nothing; a CPU takes hours for it.
KEEP_AFTER = 300.0


def experts_at_once(plan: Plan, number: int, device: torch.device) -> int:
    """How many experts of a block are solved at once: as many as AT_ONCE holds, and one at least.

    It follows from their shapes and from the length of the text, so a model has the same bytes wherever it is
    converted on a kind of device. Beside what the solver takes that is what their last linears read.
    """
    counts = [1]
    for part in plan.structure.parts[number]:
        if part.experts:
            first, last = _linears_of_expert(plan, number, part)
            solving = max(gptq.bytes_taken(one[0].k, sum(fate.n for fate in one)) for one in (first, last))
            each = solving + read_of_expert(plan, number, part)
            counts.append(max(1, min(part.experts, AT_ONCE[device.type] // each)))
    return max(counts)


def read_of_expert(plan: Plan, number: int, part: Part) -> int:
    """Bytes that the last linear of an expert reads, on the average of all experts and in both models."""
    first, last = _linears_of_expert(plan, number, part)
    tokens = plan.recipe.samples * plan.recipe.sequence_length
    rows = max(tokens * part.choices // part.experts, min(tokens, first[0].k))
    return 2 * plan.dtype.itemsize * last[0].k * rows


def _linears_of_expert(plan: Plan, number: int, part: Part) -> list[list[Fate]]:
    """Those that read what enters the first expert of a block, and those that read what they give."""
    path = f"{plan.structure.blocks}.{number}"
    return [[plan.fates[f"{path}.{name}"] for name in stage] for stage in part.stages[:2]]


def in_several(plan: Plan, number: int, device: torch.device) -> bool:
    """Whether the experts of a block are solved in more than one chunk, and are kept chunk by chunk."""
    most = max((part.experts for part in plan.structure.parts[number]), default=0)
    return experts_at_once(plan, number, device) < most


def chunk_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes on disk of what is kept of a block at the most, until it is finished."""
    if plan.repack or plan.tunes:
        return 0
    sizes = {number: 0 for number in range(plan.blocks) if in_several(plan, number, device)}
    for spec in plan.specs if sizes else ():
        number = plan.structure.block_of(spec.name)
        if number in sizes and spec.name in plan.owner:
            sizes[number] += spec.nbytes
    return max(sizes.values(), default=0)


class Chunks:
    """What is solved of one block, in files 0, 1, ... of a directory while the block is not finished.

    They hold whole calls of the solver, in their order, for bits can depend on what is solved side by side.
    """

    def __init__(self, directory: Path):
        """Begin to count the seconds."""
        self._directory = directory
        self._new: list[Packed] = []
        self._since = time.monotonic()

    def _file(self, number: int) -> Path:
        return self._directory / f"{number}.safetensors"

    def _count(self) -> int:
        return len(list(self._directory.glob("*.safetensors")))

    def earlier(self) -> Iterator[Packed]:
        """What there is on disk, of a run that was stopped, in the order in which it was solved.

        ConvertError where one of the files is damaged or gone.
        """
        for number in range(self._count()):
            tensors, rows = kept(self._file(number))
            of: dict[str, dict[str, torch.Tensor]] = {row["name"]: {} for row in rows}
            for name, tensor in tensors.items():
                of[name.rpartition(".")[0]][name] = tensor
            for row in rows:
                yield of[row["name"]], row

    def add(self, solved: Sequence[Packed]) -> None:
        """Take what was solved at once; keep it, with all since the last time, if that is long ago."""
        self._new += solved
        if time.monotonic() - self._since < KEEP_AFTER:
            return
        tensors = {name: tensor for one, _ in self._new for name, tensor in one.items()}
        try:
            keep(self._file(self._count()), tensors, [row for _, row in self._new])
        except OSError as error:
            log.warning("%d matrices are not kept (%s): a run that is stopped now solves them again",
                        len(self._new), error)  # fmt: skip
        else:
            self._new.clear()
        self._since = time.monotonic()
