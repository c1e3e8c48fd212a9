"""Codes of a block, wherever they come from, and how a matrix is packed with them.

They are solved on calibration text (solve.py), tuned after that (tune.py), or kept from a quantized source
(repack.py). Weights that are only pruned come the same way as codes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from marlin_convert.errors import FormatError
from marlin_convert.matrix import Fate, Layout
from marlin_convert.plan import Plan
from marlin_convert.quantized import SIGNS, QuantizedLinear, same_codes, side_by_side

Packed = tuple[dict[str, Tensor], dict[str, Any]]  # tensors of a linear, and what the manifest says of it
Outcome = tuple[Fate, Any, dict[str, Any]]  # a matrix, the layer or weight it has become, and its row

# Weights whose codes a GPU packs as one.
TOGETHER = 1 << 26


@dataclass(frozen=True)
class Tuned:
    """What tuning has changed beside codes and scales, and what is to be said of it.

    `norms` take the places of tensors of the source, by name; `record` is for the manifest; `seconds` is how
    long it took in this run.
    """

    norms: dict[str, Tensor]
    record: dict[str, Any]
    seconds: float


class Codes(Protocol):
    """Where the codes of a block come from: solved, tuned, or unpacked from a quantized source."""

    replayed: int
    divergence: float | None  # of what left the last block from what left the original's, where it is known
    tuned: Tuned | None  # None where nothing was

    def block(self, number: int) -> Iterator[Packed]:
        """Every packed linear of a block."""
        ...


def pack(
    fate: Fate, layer: QuantizedLinear, plan: Plan, row: dict[str, Any], memory: Tensor | None = None
) -> Packed:
    """The tensors of a packed linear by full name; what was packed is unpacked again and compared.

    With its `row` of the manifest, which says of what signs its scales are. The codes it is compared with are
    put in `memory`, if that is given.
    """
    try:
        packed = plan.pack(fate, layer)
    except FormatError as error:
        hint = error.hint or f"leave it dense with --skip '{fate.name}'."
        raise FormatError(f"{fate.name}: {error}.", hint) from error
    if not _same(plan.unpack(fate, packed, memory), layer):
        raise _lost(fate)
    return _named(fate, packed), row | {"scales": layer.signs}


def pack_all(matrices: list[Outcome], plan: Plan) -> Iterator[Packed]:
    """Matrices that were solved, packed, and those that are only pruned; each is taken from the list for it.

    On a GPU, which would wait for the steps of each, those of one shape are packed as one.
    """
    while matrices:
        fate, found, row = matrices[0]
        if isinstance(found, Tensor):
            del matrices[0]
            yield {f"{fate.name}.weight": found.cpu()}, row
            continue
        count = 1
        if found.codes.is_cuda and not fate.n % 64:  # of any layout whole words, and whole tiles
            most = max(1, TOGETHER // found.codes.numel())
            _, same = next(groupby(matrices[:most], key=_kind))
            count = len(list(same))
        alike = matrices[:count]
        del matrices[:count], found
        packed = pack_as_one(alike, plan) if count > 1 else []
        yield from packed or (pack(fate, layer, plan, row) for fate, layer, row in alike)


def _kind(matrix: Outcome) -> tuple[int, int, Layout]:
    """What those have in common that can be packed side by side."""
    fate, *_ = matrix
    return fate.k, fate.n, fate.layout


def pack_as_one(matrices: Sequence[Outcome], plan: Plan) -> list[Packed]:
    """Matrices of one shape and layout, packed side by side; none where one of them cannot be packed."""
    fates, layers, rows = zip(*matrices, strict=True)
    whole = side_by_side(layers)
    try:
        packed = plan.pack(fates[0], whole)
    except FormatError:
        return []
    of_each = plan.divided(fates[0], packed, len(fates))
    # the last one alone too: its place in the whole is that of all before it
    if not (
        _same(plan.unpack(fates[0], packed), whole) and _same(plan.unpack(fates[-1], of_each[-1]), layers[-1])
    ):
        raise _lost(fates[-1])
    signed = (whole.scales < 0).any(0).view(len(layers), -1).any(1).tolist()
    return [
        (_named(fate, tensors), row | {"scales": SIGNS[any_signed]})
        for fate, tensors, row, any_signed in zip(fates, of_each, rows, signed, strict=True)
    ]


def _lost(fate: Fate) -> RuntimeError:
    return RuntimeError(
        f"{fate.name} does not survive {fate.layout.format}; this is a bug, nothing was published"
    )


def _named(fate: Fate, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{fate.name}.{suffix}": tensor for suffix, tensor in packed.items()}


def _same(again: QuantizedLinear, layer: QuantizedLinear) -> bool:
    """Whether what was packed is what a layer says, once it is unpacked `again`."""
    return (
        same_codes(again.codes, layer.codes)
        and torch.equal(again.scales.float(), layer.scales.float())
        and all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in ((again.zeros, layer.zeros), (again.group_of_row, layer.group_of_row))
        )
        and (again.kept is None or layer.kept is None or not bool((layer.kept & ~again.kept).any()))
    )


def weight_of(fate: Fate, stored: Mapping[str, Tensor], plan: Plan) -> Tensor:
    """The weight (n, k) of a matrix by the tensors that it is written as, by suffix, in the plan's type."""
    return stored["weight"] if fate.pruned else plan.unpack(fate, stored).dequantize(plan.dtype)
