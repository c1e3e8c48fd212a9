"""Which rank solves and packs what, and how the others learn what it has found.

Of experts each rank solves some, and only it needs what their inputs sum up to. A linear that is alone cannot
be shared so: the ranks have the sums, and each solves some of its outputs, which do not depend on the others.
Then all have the codes, for the text goes on through all of them, and any rank can pack any matrix; the first
gets what is packed, and writes it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from marlin_convert.codes import Packed
from marlin_convert.quantized import QuantizedLinear, side_by_side
from marlin_convert.ranks import Ranks, Share
from marlin_convert.sums import Sums

T = TypeVar("T")

# A layer, or a weight (n, k) that is only pruned, or some outputs of either; what the manifest says of it;
# the energies (2,) of its error and outputs.
Found = tuple[QuantizedLinear | Tensor, dict[str, Any], Tensor]


class Owners:
    """How so many stages that are alike are shared by ranks."""

    def __init__(self, ranks: Ranks, stages: int):
        self._ranks = ranks
        self._count = stages
        self._whole = stages >= ranks.count

    @property
    def outputs(self) -> Share:
        """What of the outputs of its stages this rank solves."""
        return Share() if self._whole else self._ranks.share

    def stages(self, rank: int) -> range:
        """The stages that a rank solves, or a part of them."""
        return Share(rank, self._ranks.count).range(self._count) if self._whole else range(self._count)

    def sum_up(self, sums: Sequence[Sums]) -> None:
        """Make the sums of every stage those of all ranks, where they are wanted."""
        owner = {stage: rank for rank in range(self._ranks.count) for stage in self.stages(rank)}
        _, counts = self._ranks.counted(torch.tensor([(one.tokens, one.routed or 0) for one in sums]))
        terms: list[Tensor] = []
        owners: list[int] = []
        for stage, (one, (tokens, routed)) in enumerate(zip(sums, counts.tolist(), strict=True)):
            of_one = one.of_all(tokens, routed)
            terms += of_one
            owners += [owner[stage]] * len(of_one)
        self._ranks.sum(terms, owners if self._whole else None)

    def exchange(self, found: Sequence[Found], device: torch.device) -> list[Found]:
        """What all ranks have found, whole, in one order for all."""
        # fetched at once: a GPU would be waited for every time
        of_all = torch.stack([energies for *_, energies in found]).tolist() if found else []
        said = [(row, _named(what), energies) for (what, row, _), energies in zip(found, of_all, strict=True)]
        tensors = [tensor for what, _, _ in found for tensor in _tensors(what)]
        pieces: dict[str, list[Found]] = {}
        for words, sent in self._ranks.exchange(said, tensors, device):
            left = iter(sent)
            for row, named, energies in words:
                piece = _made(named, left), row, torch.tensor(energies, dtype=torch.float64)
                pieces.setdefault(row["name"], []).append(piece)
        return [_whole(of_one) for of_one in pieces.values()]


def _tensors(what: QuantizedLinear | Tensor) -> list[Tensor]:
    """The tensors that have to be sent of a layer or of a weight."""
    if isinstance(what, Tensor):
        return [what]
    return [what.codes, what.scales, *([] if what.kept is None else [what.kept])]


def _named(what: QuantizedLinear | Tensor) -> tuple[int, int, bool] | None:
    """The rest of a layer; None for a weight."""
    return None if isinstance(what, Tensor) else (what.group_size, what.bits, what.kept is not None)


def _made(named: tuple[int, int, bool] | None, tensors: Iterator[Tensor]) -> QuantizedLinear | Tensor:
    """What was sent, of the next of all tensors that were."""
    if named is None:
        return next(tensors)
    group_size, bits, sparse = named
    codes, scales = next(tensors), next(tensors)
    return QuantizedLinear(codes, scales, group_size, bits, kept=next(tensors) if sparse else None)


def _whole(pieces: Sequence[Found]) -> Found:
    """A matrix of the outputs that the ranks have solved."""
    found, (row, *_), energies = zip(*pieces, strict=True)
    if isinstance(found[0], Tensor):
        return torch.cat(found), row, sum(energies)
    return side_by_side(found), row, sum(energies)


def packed_by_all(
    ranks: Ranks,
    matrices: Sequence[T],
    sizes: Sequence[int],
    pack: Callable[[list[T]], Iterable[Packed]],
    device: torch.device,
) -> list[Packed]:
    """Matrices of these sizes, packed; all ranks have all of them, and pack some.

    The first rank is given the tensors of all, in their order, the others nothing. They go to all ranks,
    which takes no longer: the first rank's link limits it, and gloo does not say when one send is done.
    """
    packer = _evenly(sizes, ranks.count)
    mine = list(pack([one for one, rank in zip(matrices, packer, strict=True) if rank == ranks.rank]))
    said = [(list(tensors), row) for tensors, row in mine]
    sent = ranks.exchange(said, [tensor for tensors, _ in mine for tensor in tensors.values()], device)
    if not ranks.first:
        return []
    of_ranks = [(iter(words), iter(tensors)) for words, tensors in sent]
    packed = []
    for rank in packer:
        words, tensors = of_ranks[rank]
        names, row = next(words)
        # copies: they came as one with all that the rank has packed, which would stay as long as any of it
        packed.append(({name: next(tensors).clone() for name in names}, row))
    return packed


def _evenly(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank has which of some tasks of these sizes: the largest first, each to who has least to do."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owner[number] = load.index(min(load))
        load[owner[number]] += sizes[number]
    return owner
