"""How ranks share a stage that all of them have: the sums, the solving, the packing.

Each solves some of the outputs, which do not depend on the others. Then all have the codes, for the text goes
on through all of them, and any rank can pack any matrix; the first gets what is packed, and writes it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from marlin_convert.codes import Packed
from marlin_convert.quantized import QuantizedLinear, side_by_side
from marlin_convert.ranks import Ranks
from marlin_convert.sums import Sums

T = TypeVar("T")

# A layer, or a weight (n, k) that is only pruned, or some outputs of either; what the manifest says of it;
# the energies (2,) of its error and outputs; where it is to be tuned, latents (n, k).
Found = tuple[QuantizedLinear | Tensor, dict[str, Any], Tensor, Tensor | None]


def sum_up(ranks: Ranks, sums: Sums) -> None:
    """Make the sums of a stage those of all ranks."""
    ranks.sum(sums.of_all(sum(ranks.all_say(sums.tokens))))


def exchange(ranks: Ranks, found: Sequence[Found], device: torch.device) -> list[Found]:
    """What all ranks have found of the outputs, whole, in one order for all."""
    # fetched at once: a GPU would be waited for every time
    of_all = torch.stack([energies for *_, energies, _ in found]).tolist() if found else []
    said = [
        (row, _named(what), energies, latents is not None)
        for (what, row, _, latents), energies in zip(found, of_all, strict=True)
    ]
    tensors = [tensor for what, *_, latents in found for tensor in _tensors(what, latents)]
    pieces: dict[str, list[Found]] = {}
    for words, sent in ranks.exchange(said, tensors, device):
        left = iter(sent)
        for row, named, energies, tuned in words:
            made, of_energies = _made(named, left), torch.tensor(energies, dtype=torch.float64)
            piece = made, row, of_energies, next(left) if tuned else None
            pieces.setdefault(row["name"], []).append(piece)
    return [_whole(of_one) for of_one in pieces.values()]


def _tensors(what: QuantizedLinear | Tensor, latents: Tensor | None) -> list[Tensor]:
    """The tensors that have to be sent of a layer or of a weight."""
    if isinstance(what, Tensor):
        return [what]
    return [one for one in (what.codes, what.scales, what.kept, latents) if one is not None]


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
    found, (row, *_), energies, latents = zip(*pieces, strict=True)
    if isinstance(found[0], Tensor):
        return torch.cat(found), row, sum(energies), None
    return side_by_side(found), row, sum(energies), None if latents[0] is None else torch.cat(latents)


def packed_here(ranks: Ranks, matrices: Sequence[T], sizes: Sequence[int]) -> list[T]:
    """Those that this rank packs, of matrices of these sizes that all ranks have."""
    packers = _evenly(sizes, ranks.count)
    return [one for one, rank in zip(matrices, packers, strict=True) if rank == ranks.rank]


def collected(ranks: Ranks, packed: Sequence[Packed], device: torch.device) -> list[Packed]:
    """What all ranks have packed, at the first of them; the others get nothing.

    Tensors go to all ranks, which takes no longer: the first rank's link limits it, and gloo does not say
    when one send is done.
    """
    said = [(list(tensors), row) for tensors, row in packed]
    sent = ranks.exchange(said, [tensor for tensors, _ in packed for tensor in tensors.values()], device)
    if not ranks.first:
        return []
    return [
        ({name: _kept_alone(next(left)) for name in names}, row)
        for words, tensors in sent
        for left in [iter(tensors)]
        for names, row in words
    ]


def _kept_alone(tensor: Tensor) -> Tensor:
    """A tensor as it came, or a copy: of odd size it is written last, and would keep all it came with."""
    return tensor.clone() if tensor.nbytes % 8 else tensor


def _evenly(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank has which of some tasks of these sizes: the largest first, each to who has least to do."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owner[number] = load.index(min(load))
        load[owner[number]] += sizes[number]
    return owner
