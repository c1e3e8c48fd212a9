"""Which rank solves what of stages that are alike, and how all of them learn what it has found.

Of experts each rank solves some, and only it needs what their inputs sum up to. A linear that is alone cannot
be shared so: the ranks have the sums, and each solves some of its outputs, which do not depend on the others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlin_convert.quantized import QuantizedLinear
from marlin_convert.ranks import Ranks, Share
from marlin_convert.sums import Sums

# A layer or some of its outputs, what the manifest says of it, the energies (2,) of its error and outputs.
Found = tuple[QuantizedLinear, dict[str, Any], Tensor]


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
        for stage, (one, (tokens, routed)) in enumerate(zip(sums, counts.tolist(), strict=True)):
            to = owner[stage] if self._whole else None
            one.sum_up(partial(self._ranks.sum, to=to), tokens, routed)

    def exchange(self, found: Sequence[Found], device: torch.device) -> list[Found]:
        """What all ranks have found, whole, in one order for all."""
        said = [(row, layer.group_size, layer.bits, energies.tolist()) for layer, row, energies in found]
        tensors = [tensor for layer, _, _ in found for tensor in (layer.codes, layer.scales)]
        pieces: dict[str, list[tuple[Any, Tensor, Tensor]]] = {}
        for words, sent in self._ranks.exchange(said, tensors, device):
            for one, codes, scales in zip(words, sent[::2], sent[1::2], strict=True):
                pieces.setdefault(one[0]["name"], []).append((one, codes, scales))
        return [_whole(of_one) for of_one in pieces.values()]


def _whole(pieces: Sequence[tuple[Any, Tensor, Tensor]]) -> Found:
    """A layer of the outputs that the ranks have solved."""
    (row, group_size, bits, _), *_ = (words for words, _, _ in pieces)
    energies = torch.tensor([words[3] for words, _, _ in pieces], dtype=torch.float64).sum(0)
    codes, scales = (torch.cat([piece[place] for piece in pieces], 1) for place in (1, 2))
    return QuantizedLinear(codes, scales, group_size, bits), row, energies
