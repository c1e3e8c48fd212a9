"""Experts stored in MXFP4, read as the floats they mean: gpt-oss as it is on the Hub.

    NAME_blocks  (E, n, k / 32, 16) uint8: two values of 4 bits (E2M1) in a byte, the first in its low bits
    NAME_scales  (E, n, k / 32) uint8: an exponent of two for 32 values, less 127

A value times its power of two has so few digits that bfloat16 holds every one
(OCP Microscaling Formats specification 1.0, section 5.3.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from marlin_convert import formats
from marlin_convert.checkpoint.reader import TensorInfo
from marlin_convert.errors import SourceError

BLOCKS, SCALES = "_blocks", "_scales"
# Values that share a scale.
SIZE = 32
# What 4 bits mean: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-one for one in _MAGNITUDES))
# Read as a scale, this is no number.
NAN = 255


def says(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config says that experts are stored so."""
    return formats.method_of(config) == "mxfp4"


@dataclass(frozen=True)
class Stack(TensorInfo):
    """The weights (E, n, k) of all experts; `start` to `end` are the values, `scales` their exponents."""

    scales: TensorInfo

    def expert(self, name: str, number: int, rows: slice) -> "Weight":
        """Some of the n rows of one expert's weight, by this name."""
        count, n, k = self.shape
        values, exponents = (self.end - self.start) // count, n * k // SIZE
        scales = self.scales
        return Weight(
            name, self.code, (len(range(n)[rows]), k), self.file,
            self.start + number * values, self.start + (number + 1) * values,
            TensorInfo(scales.name, scales.code, (n, k // SIZE), scales.file,
                       scales.start + number * exponents, scales.start + (number + 1) * exponents),
            rows,
        )  # fmt: skip


@dataclass(frozen=True)
class Weight(TensorInfo):
    """Some `rows` of the weight that `start` to `end` hold the values of."""

    scales: TensorInfo
    rows: slice

    def read(self) -> torch.Tensor:
        """The weight in bfloat16; SourceError for a scale that is no number."""
        exponents = self.scales.read()[self.rows]
        if bool((exponents == NAN).any()):
            raise SourceError(f"{self.scales.name} holds NaN.", "the source is damaged; fetch it again.")
        n, groups = exponents.shape
        pairs = self._read_as(torch.uint8).view(-1, groups, SIZE // 2)[self.rows]
        values = torch.tensor(VALUES, dtype=torch.bfloat16)
        both = torch.stack([values[(pairs & 15).int()], values[(pairs >> 4).int()]], -1)
        return torch.ldexp(both.flatten(-2), exponents[..., None].int() - 127).view(n, groups * SIZE)


def pair(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with one for every pair of values and scales, under the name that both have.

    SourceError, from the headers, where one of the two is missing or they do not fit together.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in tensors:
            continue
        if not name.endswith(BLOCKS):
            found[name] = info
            continue
        whole = name.removesuffix(BLOCKS)
        scales = tensors.get(whole + SCALES)
        if scales is None:
            raise SourceError(f"{name} has no {whole}{SCALES} beside it.", "fetch the model again.")
        if (
            len(info.shape) != 4
            or info.shape[3] != SIZE // 2
            or scales.shape != info.shape[:3]
            or (info.code, scales.code) != ("U8", "U8")
        ):
            raise SourceError(
                f"{name} is {info.code} {info.shape} and its scales {scales.code} {scales.shape}; "
                f"meant are U8 (experts, n, k / {SIZE}, {SIZE // 2}) and U8 without the last.",
                "fetch the model again.",
            )
        count, n, groups, _ = info.shape
        shape = (count, n, groups * SIZE)
        found[whole] = Stack(whole, "BF16", shape, info.file, info.start, info.end, scales)
    return found
