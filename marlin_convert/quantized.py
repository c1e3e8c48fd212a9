"""The hinge between solvers and formats: integer codes and scales of one linear layer, in natural order."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# What is said of scales: whether any of them is negative.
SIGNS = ("positive", "signed")


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One quantized linear layer: weight[n, k] = (codes[k, n] - zero) * scale, both of the group of row k.

    codes         (k, n) uint8, unsigned, 0 .. 2**bits - 1
    scales        (groups, n) float16, bfloat16 or float32; may be negative
    group_size    rows sharing a scale, 1 .. k (k: one scale per column)
    bits          4 or 8
    zeros         (groups, n) uint8 zero codes; None: symmetric, all of them 2**(bits - 1)
    group_of_row  (k,) int32, only when it is not row // group_size (activation order)
    kept          (k, n) bool, where 2:4 pruning says which weights it left: one of these may be zero and is
                  still told from one that was pruned; None: nobody says

    ValueError when the shapes or dtypes do not fit together: a bug of the caller, never of the model.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    bits: int = 4
    zeros: Tensor | None = None
    group_of_row: Tensor | None = None
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise ValueError(f"codes must be (k, n) uint8, are {tuple(self.codes.shape)} {self.codes.dtype}")
        k, n = self.codes.shape
        if self.bits not in (4, 8) or not 1 <= self.group_size <= k:
            raise ValueError(f"bits {self.bits}, group_size {self.group_size} for k = {k}")
        shape = (-(-k // self.group_size), n)
        if self.scales.shape != shape:
            raise ValueError(f"scales must be {shape}, are {tuple(self.scales.shape)}")
        if self.zeros is not None and (self.zeros.shape != shape or self.zeros.dtype != torch.uint8):
            raise ValueError(f"zeros must be {shape} uint8, are {tuple(self.zeros.shape)} {self.zeros.dtype}")
        order = self.group_of_row
        if order is not None and (order.shape != (k,) or order.dtype != torch.int32):
            raise ValueError(f"group_of_row must be ({k},) int32, is {tuple(order.shape)} {order.dtype}")
        if self.kept is not None and (self.kept.shape != (k, n) or self.kept.dtype != torch.bool):
            raise ValueError(f"kept must be {k, n} bool, is {tuple(self.kept.shape)} {self.kept.dtype}")

    @property
    def signs(self) -> str:
        """ "signed" if any scale is negative, else "positive"."""
        return SIGNS[bool((self.scales < 0).any())]

    @classmethod
    def normalized(
        cls,
        codes: Tensor,
        scales: Tensor,
        group_size: int,
        bits: int = 4,
        zeros: Tensor | None = None,
        group_of_row: Tensor | None = None,
    ) -> "QuantizedLinear":
        """The layer, zeros None if all are the middle code, group_of_row None if it is row // group_size."""
        if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
            zeros = None
        if group_of_row is not None:
            group_of_row = group_of_row.to(torch.int32)
            if torch.equal(group_of_row, contiguous_groups(codes.shape[0], group_size, codes.device)):
                group_of_row = None
        return cls(codes, scales, group_size, bits, zeros, group_of_row)

    def to(self, device: torch.device) -> "QuantizedLinear":
        """The same layer on a device."""
        held = [getattr(self, one.name) for one in fields(self)]
        moved: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in held]
        return QuantizedLinear(*moved)

    @property
    def k(self) -> int:
        """Inputs of the layer."""
        return self.codes.shape[0]

    @property
    def n(self) -> int:
        """Outputs of the layer."""
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Groups of rows: one scale each per output."""
        return self.scales.shape[0]

    def quad_weights(self) -> Tensor:
        """How many of rows 4t .. 4t + 3 of a column are kept or not zero: (k // 4, n) uint8.

        A layer that has nowhere more than two is 2:4.
        """
        found = torch.empty(self.k // 4, self.n, dtype=torch.uint8, device=self.codes.device)
        step = max(1, (1 << 18) // self.n)  # the temporaries stay in cache
        for start in range(0, len(found), step):
            stop = min(start + step, len(found))
            rows = slice(4 * start, 4 * stop)
            # comparisons of bytes are ten times slower than this
            left = (self.codes[rows] ^ self._zeros(rows)).clamp_max_(1)
            if self.kept is not None:
                left |= self.kept[rows].view(torch.uint8)
            quads = left.view(-1, 4, self.n)
            torch.add(quads[:, 0] + quads[:, 1], quads[:, 2] + quads[:, 3], out=found[start:stop])
        return found

    def _zeros(self, rows: slice) -> Tensor | int:
        """The zero codes of rows."""
        return 1 << (self.bits - 1) if self.zeros is None else self.zeros[self._groups(rows)]

    def _groups(self, rows: slice) -> Tensor:
        """The group of each of rows."""
        if self.group_of_row is not None:
            return self.group_of_row[rows]
        return torch.arange(rows.start, rows.stop, device=self.codes.device) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as nn.Linear holds it: (n, k), computed in float32 and then cast to dtype."""
        weight = torch.empty(self.n, self.k, dtype=dtype, device=self.codes.device)
        # in slabs of rows: the float32 temporaries stay small beside the weight, on a CPU in its cache
        step = max(1, (1 << 25 if self.codes.is_cuda else 1 << 20) // self.n)
        for start in range(0, self.k, step):
            rows = slice(start, min(start + step, self.k))
            values = self.codes[rows].to(torch.float32)
            values -= self._zeros(rows)
            values *= self.scales[self._groups(rows)]
            weight[:, rows] = values.t()
        return weight


def side_by_side(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Symmetric layers of the same inputs and groups as one, which has the outputs of all."""
    codes, scales = (
        torch.cat(of_all, 1) for of_all in zip(*((one.codes, one.scales) for one in layers), strict=True)
    )
    kept = [one.kept for one in layers if one.kept is not None]
    return replace(layers[0], codes=codes, scales=scales, kept=torch.cat(kept, 1) if kept else None)


def dequantized(layers: Sequence[QuantizedLinear]) -> list[Tensor]:
    """The weights (n, k) in float32 of layers of the same inputs and groups, on a GPU all of them as one."""
    if len(layers) > 1 and layers[0].codes.is_cuda:
        return dequantized_as_one(layers)
    return [layer.dequantize() for layer in layers]


def dequantized_as_one(layers: Sequence[QuantizedLinear]) -> list[Tensor]:
    """The same side by side; some of the layers may be 2:4."""
    whole = side_by_side([replace(layer, kept=None) for layer in layers])
    return list(whole.dequantize().split([layer.n for layer in layers]))


def contiguous_groups(k: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The group of each of k rows when groups are runs of group_size rows: (k,) int32."""
    return torch.arange(k, dtype=torch.int32, device=device) // group_size


def same_codes(a: Tensor, b: Tensor) -> bool:
    """torch.equal of two uint8 tensors, eight bytes at a time where their memory allows it."""
    if a.shape == b.shape and a.numel() % 8 == 0 and a.is_contiguous() and b.is_contiguous():
        a, b = a.view(-1), b.view(-1)
        if a.storage_offset() % 8 == 0 and b.storage_offset() % 8 == 0:
            a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def quad_nonzeros(weight: Tensor) -> Tensor:
    """How many non-zeros every quad of a weight (n, k) has: (n, k / 4) int64; more than two are not 2:4."""
    return (weight.view(len(weight), -1, 4) != 0).sum(-1)


def first_crowded(held: Tensor) -> str:
    """Where the first quad with more than two non-zeros is, in words; there must be one."""
    n, quad = (held > 2).nonzero()[0].tolist()
    return f"the first, inputs {4 * quad} to {4 * quad + 3} of output {n}"
