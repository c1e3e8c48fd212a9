"""The record that travels: what a matrix is, how it is stored, and what becomes of it.

The plan makes a `Fate` for every matrix, the work takes them, the manifest holds them, and whoever wants to
know what a checkpoint is made of reads them back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# What a row says only where it is not so.
_USUAL = {"sparse": False, "symmetric": True, "act_order": False, "reason": None}


@dataclass(frozen=True)
class Matrix:
    """A linear's weight: its name on disk, without `.weight`, and its k inputs and n outputs."""

    name: str
    k: int
    n: int


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored.

    format      "marlin", "marlin-24", "gptq" or "compressed-tensors": integer codes; "dense": floats
    bits        of a weight or of its code
    group_size  rows sharing a scale; -1: all rows
    sparse      of every four weights of a column two are zero
    symmetric   no zero points are stored
    act_order   groups follow activation order and not the rows
    dtype       type of the floats that are stored: the weight's, or of its scales
    """

    format: str
    bits: int
    group_size: int
    dtype: str = "float16"
    sparse: bool = False
    symmetric: bool = True
    act_order: bool = False


@dataclass(frozen=True)
class Fate:
    """What becomes of a matrix, and why, if it is left dense, or not 2:4 while others are."""

    matrix: Matrix
    layout: Layout
    reason: str | None = None

    @property
    def name(self) -> str:
        """The matrix's name."""
        return self.matrix.name

    @property
    def k(self) -> int:
        """Inputs of the matrix."""
        return self.matrix.k

    @property
    def n(self) -> int:
        """Outputs of the matrix."""
        return self.matrix.n

    @property
    def packed(self) -> bool:
        """Whether the matrix is written as integer codes."""
        return self.layout.format != "dense"

    @property
    def pruned(self) -> bool:
        """Whether the matrix is written dense, but pruned."""
        return not self.packed and self.layout.sparse

    @property
    def worked_on(self) -> bool:
        """Whether the matrix is packed or pruned, and not left as it is."""
        return self.packed or self.pruned

    def row(self) -> dict[str, Any]:
        """The fate as a manifest holds it; `fate_of` reads it back."""
        said = asdict(self.matrix) | asdict(self.layout) | {"reason": self.reason}
        return {key: value for key, value in said.items() if key not in _USUAL or value != _USUAL[key]}


def dense(matrix: Matrix, dtype: str, reason: str | None = None, *, sparse: bool = False) -> Fate:
    """The fate of a matrix that is written as floats, left as it is or pruned."""
    return Fate(matrix, Layout("dense", 32 if dtype == "float32" else 16, -1, dtype, sparse), reason)


def fate_of(row: Mapping[str, Any]) -> Fate:
    """The fate that a row of a manifest tells; ValueError naming what is missing in it or of another kind."""
    said: dict[str, Any] = _USUAL | {key: row[key] for key in row if row[key] is not None}
    for key, kind in _KINDS.items():
        if type(said.get(key)) is not kind:
            raise ValueError(f"{key} is {said.get(key)!r}")
    reason = said["reason"]
    if not isinstance(reason, str | None):
        raise ValueError(f"reason is {reason!r}")
    return Fate(
        Matrix(**{field.name: said[field.name] for field in fields(Matrix)}),
        Layout(**{field.name: said[field.name] for field in fields(Layout)}),
        reason,
    )


_KINDS = {field.name: field.type for record in (Matrix, Layout) for field in fields(record)}


def by_name(fates: Iterable[Fate]) -> dict[str, Fate]:
    """Fates by the name of their matrix, in their order."""
    return {fate.name: fate for fate in fates}
