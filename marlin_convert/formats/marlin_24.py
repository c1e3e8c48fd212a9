"""Sparse MARLIN: 4-bit symmetric codes of which 2:4 pruning left two in every quad, rows 4t .. 4t + 3.

    B_24    (k / 32, 2n) int32   the two codes left of every quad: k / 2 rows, in tiles of 16 x 64
    B_meta  (k / 32, 2n) int16   where in their quads they were, four bits a quad
    s       (groups, n) float16  columns permuted if there are several groups

Nibble f of word 128J + 4i + j of row t of B_24 holds the code, of the rows that are left, of
row 16t + 2 (i mod 4) + (f >> 2) + 8 (f & 1) and column 64J + 8 (i div 4) + 4 ((f >> 1) & 1) + j.
Nibble q of B_meta is of the quad of rows 32t + 16 half + 4q ... and column 64J + 8h + 4 c2 + 2 c1 + c0 if its
place is row t and column 128J + 64 c1 + 8h + 4 c0 + 2 half + c2.

Of a quad the codes at lo and hi are left, lo < hi, and its metadata is lo + 4 hi. The layout lets any two be
left that hold all that is not zero; peers take, and so do we where nobody says what was kept,

    not zero  -    0    1    2    3    0,1  0,2  1,2  0,3  1,3  2,3
    left      2,3  0,2  1,2  2,3  2,3  0,1  0,2  1,2  0,3  1,3  2,3

Sources: IST-DASLab/Sparse-Marlin; vLLM 0.9 to 0.14 (gptq_marlin_24) read it; compressed-tensors up to 0.16
writes the same bytes as weight_packed, meta and scale_packed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from marlin_convert.errors import FormatError
from marlin_convert.formats import bounds, mixtures, words
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
from marlin_convert.matrix import Fate
from marlin_convert.quantized import QuantizedLinear

SUFFIXES = ("B_24", "B_meta", "s")


def refusal(
    k: int,
    n: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    act_order: bool = False,
    least_zero: int = 8,
) -> str | None:
    """Why this layout cannot hold such a layer, even if it is 2:4; None if it can.

    Inputs divisible by 64 only are ours alone.
    """
    if bits != 4:
        return f"holds 4 bits, not {bits}"
    if not symmetric:
        return "has no zero points, and the layer is not symmetric"
    if act_order:
        return "has no group order, and the groups of the layer follow activation order"
    if k % 64:
        return f"needs inputs divisible by 64, has {k}"
    if n % 64:
        return f"needs outputs divisible by 64, has {n}"
    if group_size not in (-1, k, 128):
        return f"needs groups of 128 rows or one for all {k}, has {group_size}"
    if group_size != -1 and k % group_size:
        return f"needs inputs divisible by the group size {group_size}, has {k}"
    return None


def tensors(
    k: int, n: int, *, bits: int, group_size: int, symmetric: bool = True
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor pack writes."""
    return {
        "B_24": (torch.int32, (k // 32, 2 * n)),
        "B_meta": (torch.int16, (k // 32, 2 * n)),
        "s": (torch.float16, (groups_of(k, group_size), n)),
    }


def pack(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The three tensors of a layer, by suffix; what its kept does not say follows from the codes.

    FormatError when the layer is refused or is not 2:4, a code does not fit 4 bits, or a scale is zero, not
    finite or not a float16 number.
    """
    reason = refusal(
        layer.k,
        layer.n,
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=layer.zeros is None,
        act_order=layer.group_of_row is not None,
    )
    if reason:
        raise FormatError(f"marlin-24 {reason}")
    bounds.check_codes(layer)
    bounds.check_quads(layer)
    packed, metadata = _compress(layer.codes, layer.kept)
    return {
        "B_24": packed,
        "B_meta": _pack_metadata(metadata),
        "s": _transpose_columns(bounds.multiplied_scales(layer.scales), 2, 4),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, memory: Tensor | None = None) -> QuantizedLinear:
    """The layer in B_24, B_meta and s, or under the names of the scheme, with what was kept.

    Its codes, and what was kept, are put in memory, if that is given.
    FormatError when the tensors do not fit together, or metadata means no two rows of a quad.
    """
    b_name, _, s_name = scheme.names or SUFFIXES
    packed = tensor(tensors, b_name, (torch.int32,))
    scales = tensor(tensors, s_name, SCALE_DTYPES)
    k, n = 32 * packed.shape[0], packed.shape[1] // 2
    if packed.shape[1] % 128:
        raise FormatError(f"{b_name} must have columns divisible by 128, has {tuple(packed.shape)}")
    expect_shape(s_name, scales, (scales.shape[0], n), f"{b_name} {tuple(packed.shape)}")
    group_size = scheme.group_rows(k, scales.shape[0])
    _check_order(scheme, k)
    codes, kept = _expand(packed, _metadata(tensors, scheme, k, n), memory)
    return QuantizedLinear(codes, _transpose_columns(scales, 4, 2), group_size, kept=kept)


def peculiarities(
    tensors: Mapping[str, Tensor], scheme: Scheme, k: int, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """Zero codes and the group of each row: this layout has neither. FormatError for senseless metadata."""
    _check_order(scheme, k)
    _metadata(tensors, scheme, k, n)
    return None, None


def _check_order(scheme: Scheme, k: int) -> None:
    """Raise FormatError for the one shape whose scales compressed-tensors leaves unpermuted.

    It compares the group size with k / 2; vLLM reads them as permuted all the same.
    """
    if scheme.names and groups_of(k, scheme.group_size) == 2:
        raise FormatError(
            f"compressed-tensors does not permute the scales of {k} inputs in groups of {scheme.group_size}, "
            "and vLLM reads them as if it did: what they mean is unknown",
            hint="convert the model again from its original",
        )


def _transpose_columns(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (groups, n), every eight columns transposed as (rows, columns): 2, 4 to stored order, 4, 2 back.

    One group stays as it is, even if it is of 128 rows: the kernel counts the groups and nothing else.
    """
    groups, n = scales.shape
    if groups == 1:
        return scales
    return scales.reshape(groups, n // 8, rows, columns).transpose(2, 3).reshape(groups, n)


def only_group(scales: Tensor) -> Tensor:
    """Stored scales (1, n) of one of several groups as those of an only group are stored."""
    return _transpose_columns(scales.expand(2, -1), 4, 2)[:1]


# Codes and metadata of rows 16 apart share an octet, as they do in B_24, where they are 8 apart: row r of
# tile t is the low nibble of octet [t, r], row r + 16 the high one. Sixteen nibbles are worked on at once, in
# an int64. Axes: t tile, a quad and p row of it (r = 4a + p), then columns; kp = f >> 2 and h = (f >> 1) & 1.

_BIT = 0x1111_1111_1111_1111  # the lowest bit of every nibble
_LOW = 0x0F0F_0F0F_0F0F_0F0F  # every other nibble
_MIDDLE = -0x7777_7777_7777_7778  # 8 in every nibble: the code of zero becomes 0


def _compress(codes: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """B_24 (k / 32, 2n) int32 of codes (k, n) uint8 that are 2:4, and metadata as octets (k / 32, 4, n)."""
    k, n = codes.shape
    packed = torch.empty(k // 32, 2 * n, dtype=torch.int32, device=codes.device)
    metadata = torch.empty(k // 32, 4, n, dtype=torch.uint8, device=codes.device)
    rows = codes.contiguous().view(k // 32, 2, 16, n)
    marks = None if kept is None else kept.contiguous().view(torch.uint8).view(rows.shape)
    step = words.rows_per_slab(packed)
    planes, wide, natural = _scratch(step, n, codes.device)
    for tiles in words.slabs(k // 32, step):
        m = tiles.stop - tiles.start
        values = _join(rows[tiles]) ^ _MIDDLE
        left = values | values >> 1
        left = (left | left >> 2) & _BIT
        if marks is not None:
            left |= _join(marks[tiles])
        v0, v1, v2, v3 = values.unbind(2)
        m0, m1, _, m3 = left.unbind(2)
        both, either = m0 & m1, m0 | m1
        neither = either ^ _BIT
        # bits of lo: 1 if only row 1 of the first two is left, 2 if none; of hi: not 2 if 3, not 2 or 3 if 1
        low = (either ^ m0) | neither << 1
        high = (both | m3 | neither) << 2 | (both ^ _BIT) << 3
        metadata[tiles].view(torch.int64).copy_(low | high)
        # what is pruned is 0: or-ing chooses among the weights that can be the first, and the second
        first = v0 | v1 & ~_fill(m0) | v2 & ~_fill(either)
        second = v3 | v1 & _fill(m0) | v2 & _fill(either)
        octets = (torch.stack((first, second), 2) ^ _MIDDLE).view(torch.uint8)
        _by_octet(planes[:m]).copy_(_by_half(octets))
        words.join_octets(planes[:m].unbind(1), natural[:m], wide[:m])
        packed[tiles].view(m, n // 8, 4, 4).copy_(natural[:m].view(m, 4, n // 8, 4).transpose(1, 2))
    return packed, metadata


def _expand(packed: Tensor, metadata: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (k, n) uint8 and what was kept (k, n) bool of B_24 (k / 32, 2n) int32 and octets of metadata."""
    k, n = 32 * packed.shape[0], packed.shape[1] // 2
    codes = words.empty_codes(k, n, packed.device, memory)
    kept = words.empty_codes(k, n, packed.device, None if memory is None else memory[k * n :])
    rows, marks = codes.view(k // 32, 2, 16, n), kept.view(k // 32, 2, 16, n)
    packed = packed.contiguous()
    step = words.rows_per_slab(packed)
    planes, wide, natural = _scratch(step, n, codes.device)
    octets = torch.empty(step, 4, 2, n, dtype=torch.uint8, device=codes.device)
    for tiles in words.slabs(k // 32, step):
        m = tiles.stop - tiles.start
        natural[:m].view(m, 4, n // 8, 4).copy_(packed[tiles].view(m, n // 8, 4, 4).transpose(1, 2))
        for i, plane in enumerate(planes[:m].unbind(1)):
            words.take_octet(natural[:m], i, plane, wide[:m])
        _by_half(octets[:m]).copy_(_by_octet(planes[:m]))
        first, second = (octets[:m].view(torch.int64) ^ _MIDDLE).unbind(2)
        bits = metadata[tiles].view(torch.int64)
        lo1, lo2, b2, b3 = (bits >> i & _BIT for i in range(4))
        lo0, hi3 = (lo1 | lo2) ^ _BIT, b2 & b3
        hi1, hi2 = b2 ^ hi3, b3 ^ hi3
        values = (
            first & _fill(lo0),
            first & _fill(lo1) | second & _fill(hi1),
            first & _fill(lo2) | second & _fill(hi2),
            second & _fill(hi3),
        )
        _split(torch.stack(values, 2) ^ _MIDDLE, rows[tiles])
        _split(torch.stack((lo0, lo1 | hi1, lo2 | hi2, hi3), 2), marks[tiles])
    return codes, kept.view(torch.bool)


def _scratch(step: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Temporaries of a slab of step tile rows: octets in word order, words twice."""
    planes = torch.empty(step, 4, 4, n // 2, dtype=torch.uint8, device=device)
    wide = torch.empty(step, 4, n // 2, dtype=torch.int32, device=device)
    return planes, wide, torch.empty_like(wide)


def _join(rows: Tensor) -> Tensor:
    """Octets of rows (t, 2, 16, n) uint8 below 16, as int64 (t, a, p, n / 8)."""
    t, _, _, n = rows.shape
    return torch.add(rows[:, 0], rows[:, 1], alpha=16).view(torch.int64).view(t, 4, 4, n // 8)


def _split(octets: Tensor, rows: Tensor) -> None:
    """Write the rows (t, 2, 16, n) uint8 that _join makes into these octets."""
    t, _, _, n = rows.shape
    words.split_nibbles(octets.view(torch.uint8).view(t, 16, n), rows[:, 0], rows[:, 1])


def _fill(bits: Tensor) -> Tensor:
    """All four bits of every nibble whose lowest bit is set, and has no other."""
    return (bits << 4) - bits


def _by_half(octets: Tensor) -> Tensor:
    """Octets (t, a, kp, (n / 8, h, 4)) as int32 of four columns (t, kp, h, a, n / 8)."""
    t, _, _, n = octets.shape
    return octets.view(torch.int32).view(t, 4, 2, n // 8, 2).permute(0, 2, 4, 1, 3)


def _by_octet(planes: Tensor) -> Tensor:
    """Planes (t, (kp, h), a, (n / 8, 4)) as int32 of four columns (t, kp, h, a, n / 8)."""
    t, _, _, half = planes.shape
    return planes.view(torch.int32).view(t, 2, 2, 4, half // 4)


def _pack_metadata(metadata: Tensor) -> Tensor:
    """B_meta (k / 32, 2n) int16 of octets of metadata (k / 32, 4, n) uint8."""
    t, _, n = metadata.shape
    natural = torch.empty(t, 2, n, dtype=torch.int16, device=metadata.device)
    for tiles in words.slabs(t, words.rows_per_slab(natural[:, 0])):
        q0, q1, q2, q3 = metadata[tiles].to(torch.int16).unbind(1)
        even, odd = ((q | r << 8).view(torch.int64) for q, r in ((q0, q2), (q1, q3)))
        low, high = natural[tiles].view(torch.int64).unbind(1)
        low.copy_(even & _LOW | (odd & _LOW) << 4)
        high.copy_(even >> 4 & _LOW | odd & ~_LOW)
    columns = torch.arange(2 * n, device=metadata.device).view(2, n // 64, 8, 2, 2, 2)
    return natural.view(t, 2 * n).index_select(1, columns.permute(1, 4, 2, 5, 0, 3).flatten())


def _metadata(tensors: Mapping[str, Tensor], scheme: Scheme, k: int, n: int) -> Tensor:
    """Octets of metadata (k / 32, 4, n) uint8. FormatError when they do not fit a layer (k, n)."""
    name = (scheme.names or SUFFIXES)[1]
    meta = tensor(tensors, name, (torch.int16,))
    expect_shape(name, meta, (k // 32, 2 * n), f"a layer {k, n}")
    if n % 64:
        raise FormatError(f"{name} must have columns divisible by 128, has {tuple(meta.shape)}")
    columns = torch.arange(2 * n, device=meta.device).view(n // 64, 2, 8, 2, 2, 2)
    natural = meta.index_select(1, columns.permute(4, 0, 2, 5, 1, 3).flatten()).view(-1, 2, n)
    metadata = torch.empty(len(meta), 4, n, dtype=torch.uint8, device=meta.device)
    for tiles in words.slabs(len(meta), words.rows_per_slab(meta)):
        low, high = natural[tiles].view(torch.int64).unbind(1)
        even = (low & _LOW | (high & _LOW) << 4).view(torch.int16)
        odd = (low >> 4 & _LOW | high & ~_LOW).view(torch.int16)
        for a, quads in enumerate((even, odd, even >> 8, odd >> 8)):
            metadata[tiles, a] = quads
    _check_metadata(metadata)
    return metadata


def _check_metadata(metadata: Tensor) -> None:
    """Raise FormatError where metadata is not lo + 4 hi of lo < hi."""
    nibbles = metadata.view(torch.int64)
    b0, b1, b2, b3 = (nibbles >> i for i in range(4))
    valid = b3 & ~b2 & ~b1 | b2 & ~b1 & ~b0 | b3 & b2 & ~(b1 & b0)
    if bool((valid & _BIT == _BIT).all()):
        return
    t, _, n = metadata.shape
    quads = torch.stack((metadata & 15, metadata >> 4), 1).view(8 * t, n)
    wrong = ~torch.isin(quads, torch.tensor([4, 8, 9, 12, 13, 14], device=quads.device))
    quad, column = wrong.nonzero()[0].tolist()
    raise FormatError(
        f"the metadata of {int(wrong.sum())} of {wrong.numel()} quads names no two rows; the first, rows "
        f"{4 * quad} to {4 * quad + 3} of column {column}, has {int(quads[quad, column])}"
    )


def quantization_config(fates: Sequence[Fate]) -> dict[str, Any]:
    """The quantization_config of config.json for our readers: AutoGPTQ's keys, quant_method "marlin_24".

    The matrices named as unpruned are not 2:4 and stored in the marlin layout.
    """
    bits, group_size = mixtures.usual(mixtures.kinds(fates))
    return {
        "quant_method": "marlin_24",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "marlin_24",
        "modules_to_not_convert": mixtures.left_dense(fates),
        "unpruned": [fate.name for fate in fates if fate.packed and not fate.layout.sparse],
    }


def read_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a config already known to mean this layout. FormatError for what it does not hold."""
    return checked(
        Scheme(
            "marlin-24",
            bits=bits_of(config, "bits"),
            group_size=group_size_of(config, "group_size"),
            symmetric=boolean(config, "sym", True),
            skipped=names_of(config, "modules_to_not_convert"),
            act_order=boolean(config, "desc_act", False),
            unpruned=frozenset(names_of(config, "unpruned")),
        )
    )


def checked(scheme: Scheme) -> Scheme:
    """The scheme, if this layout can hold it; FormatError otherwise."""
    if not scheme.symmetric:
        raise FormatError("quantization_config: not symmetric, and marlin-24 has no zero points")
    if scheme.bits != 4:
        raise FormatError(f"quantization_config: {scheme.bits} bits in marlin-24, must be 4")
    if scheme.group_size not in (-1, 128):
        raise FormatError(
            f"quantization_config: groups of {scheme.group_size} in marlin-24, must be -1 or 128"
        )
    return scheme
