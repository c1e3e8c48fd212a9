"""Codes of a block, wherever they come from, and how a matrix is packed with them.

They are solved on calibration text (solve.py), tuned after that (tune.py), or kept from a quantized source
(repack.py). Weights that are only pruned come the same way as codes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from marlin_convert.errors import FormatError
from marlin_convert.matrix import Fate
from marlin_convert.plan import Plan
from marlin_convert.quantized import QuantizedLinear, same_codes

Packed = tuple[dict[str, Tensor], dict[str, Any]]  # tensors of a linear, and what the manifest says of it


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
    again = plan.unpack(fate, packed, memory)
    if not (
        same_codes(again.codes, layer.codes)
        and torch.equal(again.scales.float(), layer.scales.float())
        and all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in ((again.zeros, layer.zeros), (again.group_of_row, layer.group_of_row))
        )
        and (again.kept is None or layer.kept is None or not bool((layer.kept & ~again.kept).any()))
    ):
        raise RuntimeError(
            f"{fate.name} does not survive {fate.layout.format}; this is a bug, nothing was published"
        )
    tensors = {f"{fate.name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return tensors, row | {"scales": layer.signs}


def weight_of(fate: Fate, stored: Mapping[str, Tensor], plan: Plan) -> Tensor:
    """The weight (n, k) of a matrix by the tensors that it is written as, by suffix, in the plan's type."""
    return stored["weight"] if fate.pruned else plan.unpack(fate, stored).dequantize(plan.dtype)
