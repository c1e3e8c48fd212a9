"""AWQ "gemm" checkpoints as AutoAWQ writes them. Read only.

    qweight  (k, n / 8) int32       codes, eight columns a word
    qzeros   (groups, n / 8) int32  zero codes, the same way, nothing subtracted
    scales   (groups, n) float16

Nibble f of word w holds column 8w + (0, 2, 4, 6, 1, 3, 5, 7)[f].

Source: casper-hansen/AutoAWQ WQLinear_GEMM.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from marlin_convert.errors import FormatError
from marlin_convert.formats import words
from marlin_convert.formats.scheme import (
    SCALE_DTYPES,
    Scheme,
    bits_of,
    boolean,
    expect_shape,
    group_size_of,
    groups_of,
    names_of,
    tensor,
)
from marlin_convert.quantized import QuantizedLinear

SUFFIXES = ("qweight", "qzeros", "scales")


def tensors(
    k: int, n: int, *, bits: int, group_size: int, symmetric: bool = True
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a layer."""
    groups = groups_of(k, group_size)
    return {
        "qweight": (torch.int32, (k, n // 8)),
        "qzeros": (torch.int32, (groups, n // 8)),
        "scales": (torch.float16, (groups, n)),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, memory: Tensor | None = None) -> QuantizedLinear:
    """The layer in qweight, qzeros and scales; its codes in memory, if that is given.

    FormatError when they do not fit together.
    """
    qweight = tensor(tensors, "qweight", (torch.int32,))
    scales = tensor(tensors, "scales", SCALE_DTYPES)
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    expect_shape("scales", scales, (scales.shape[0], n), f"qweight {tuple(qweight.shape)}")
    return QuantizedLinear.normalized(
        codes=_unpack(qweight, memory),
        scales=scales,
        group_size=scheme.group_rows(k, scales.shape[0]),
        zeros=peculiarities(tensors, scheme, k, n)[0],
    )


def peculiarities(
    tensors: Mapping[str, Tensor], scheme: Scheme, k: int, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """The zero codes (groups, n) uint8 from qzeros alone, and None; FormatError when they do not fit."""
    groups = groups_of(k, scheme.group_size)
    qzeros = tensor(tensors, "qzeros", (torch.int32,))
    expect_shape("qzeros", qzeros, (groups, n // 8), f"a layer {k, n} of {groups} groups")
    return _unpack(qzeros), None


def _unpack(packed: Tensor, memory: Tensor | None = None) -> Tensor:
    """Codes (rows, n) uint8 of words (rows, n / 8) int32."""
    codes = words.empty_codes(packed.shape[0], 8 * packed.shape[1], packed.device, memory)
    eights = codes.view(torch.int64)
    for rows in words.slabs(len(packed), words.rows_per_slab(packed)):
        slab = packed[rows].to(torch.int64)
        # nibbles 0..3 are the even columns, 4..7 the odd ones: spread each half over 16-bit lanes
        even = _spread(slab & 0xFFFF)
        odd = _spread((slab >> 16) & 0xFFFF)
        torch.bitwise_or(even, odd << 8, out=eights[rows])
    return codes


def _spread(halves: Tensor) -> Tensor:
    """int64 whose low four nibbles move to the bottom of its four 16-bit lanes."""
    pairs = (halves | halves << 24) & 0x000000FF_000000FF
    return (pairs | pairs << 12) & 0x000F000F_000F000F


def read_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of an AWQ config, Hugging Face's or AutoAWQ's own. FormatError for all but version gemm."""
    version = awq_version(config)
    if version != "gemm":
        raise FormatError(f"quantization_config: awq version {version!r} is not supported")
    return Scheme(
        "awq",
        bits=bits_of(config, "bits", "w_bit", allowed=(4,)),
        group_size=group_size_of(config, "group_size", "q_group_size"),
        symmetric=not boolean(config, "zero_point", True),
        skipped=names_of(config, "modules_to_not_convert"),
    )


def awq_version(config: Mapping[str, Any]) -> str:
    """The layout under AWQ's name, in lower case: gemm, gemv, gemv_fast, marlin, exllama."""
    return str(
        config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    ).lower()
