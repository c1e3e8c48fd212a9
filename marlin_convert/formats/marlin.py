"""Dense MARLIN: 4-bit symmetric codes in the order the tensor cores of the kernel take them.

    B  (k / 16, 2n) int32   tiles of 16 x 64 codes, 128 words each
    s  (groups, n) float16  columns permuted: one way for several groups, another for one

k is a multiple of 64 and of the group size: the last group is no shorter than the others.

Nibble f of word 128J + 4i + j of row t of B holds the code of
row 16t + 2 (i mod 4) + (f >> 2) + 8 (f & 1) and column 64J + 16j + (i div 4) + 8 ((f >> 1) & 1).

Source: IST-DASLab/marlin. AutoGPTQ/AutoGPTQ writes the same bytes, and so does casper-hansen/AutoAWQ,
as qweight and scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlin_convert.errors import FormatError
from marlin_convert.formats import bounds, dynamics, mixtures, words
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

SUFFIXES = ("B", "s")
GROUP_SIZES = (32, 64, 128)


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
    """Why this layout cannot hold such a layer; None if it can.

    Groups of 32 and 64 rows, and inputs divisible by 64 only, are ours alone.
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
    if group_size not in (-1, k, *GROUP_SIZES):
        return f"needs groups of 32, 64 or 128 rows or one for all {k}, has {group_size}"
    if group_size != -1 and k % group_size:
        return f"needs inputs divisible by the group size {group_size}, has {k}"
    return None


def tensors(
    k: int, n: int, *, bits: int, group_size: int, symmetric: bool = True
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor pack writes."""
    groups = groups_of(k, group_size)
    return {"B": (torch.int32, (k // 16, 2 * n)), "s": (torch.float16, (groups, n))}


def pack(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The two tensors of a layer, by suffix.

    FormatError when the layer is refused, a code does not fit 4 bits, or a scale is zero, not finite or not a
    float16 number.
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
        raise FormatError(f"marlin {reason}")
    bounds.check_codes(layer)
    return {"B": _pack_codes(layer.codes), "s": permute_scales(bounds.multiplied_scales(layer.scales))}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, memory: Tensor | None = None) -> QuantizedLinear:
    """The layer in B and s, or under the names of the scheme. FormatError when they do not fit together."""
    b_name, s_name = scheme.names or SUFFIXES
    if b_name == "B" and "B" not in tensors and "qweight" in tensors:
        raise FormatError(
            "the config says marlin, the tensors are GPTQ's (qweight)",
            hint='GPTQModel names a kernel so: set "checkpoint_format": "gptq" in quantization_config',
        )
    packed = tensor(tensors, b_name, (torch.int32,))
    scales = tensor(tensors, s_name, SCALE_DTYPES)
    k, n = 16 * packed.shape[0], packed.shape[1] // 2
    if packed.shape[1] % 128:
        raise FormatError(f"{b_name} must have columns divisible by 128, has {tuple(packed.shape)}")
    expect_shape(s_name, scales, (scales.shape[0], n), f"{b_name} {tuple(packed.shape)}")
    group_size = scheme.group_rows(k, scales.shape[0])
    return QuantizedLinear(_unpack_codes(packed, memory), permute_scales(scales), group_size)


def peculiarities(
    tensors: Mapping[str, Tensor], scheme: Scheme, k: int, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """Zero codes and the group of each row: this layout has neither."""
    return None, None


def permute_scales(scales: Tensor) -> Tensor:
    """Scales (groups, n) from natural to stored order, or back: both permutations are their own inverses."""
    groups, n = scales.shape
    # the kernel tells the two apart by the number of groups alone, so K = 128 in groups of 128 counts as one
    if groups == 1:
        return scales.reshape(n // 32, 4, 4, 2).transpose(1, 2).reshape(1, n)
    return scales.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n)


def only_group(scales: Tensor) -> Tensor:
    """Stored scales (1, n) of one of several groups as those of an only group are stored."""
    return permute_scales(permute_scales(scales.expand(2, -1))[:1])


# Both ways go through whole words in natural order: the nibbles of a word are rows 2a, 2a + 1, 2a + 8 and
# 2a + 9 of a tile and columns c and c + 8 of 16. Nibbles move in wide operations on rows, then only words are
# permuted, an eighth as many. Axes: t tile row, k8 = f & 1, kp = f >> 2, h = (f >> 1) & 1, a = i mod 4,
# c = i div 4, J and j; the eight columns of c lie in one int64.


def _pack_codes(codes: Tensor) -> Tensor:
    """B (k / 16, 2n) int32 of codes (k, n) uint8 below 16."""
    k, n = codes.shape
    packed = torch.empty(k // 16, 2 * n, dtype=torch.int32, device=codes.device)
    rows = codes.contiguous().view(k // 16, 2, 8, n)  # t, k8, (a, kp), n
    step = words.rows_per_slab(packed)
    octets, planes, wide, natural = _scratch(step, n, codes.device)
    blocks = torch.empty_like(natural).view(step, n // 64, 16, 8)  # t, J, (a, j), c
    for tiles in words.slabs(k // 16, step):
        m = tiles.stop - tiles.start
        torch.add(rows[tiles, 0], rows[tiles, 1], alpha=16, out=octets[:m])
        _by_half(planes[:m]).copy_(_halves(octets[:m]))
        words.join_octets(planes[:m].unbind(1), natural[:m], wide[:m])
        by_block = blocks[:m].view(m, n // 64, 4, 32)
        by_block.copy_(natural[:m].view(m, 4, n // 64, 32).transpose(1, 2))
        packed[tiles].view(m, n // 64, 8, 16).copy_(blocks[:m].transpose(2, 3))
    return packed


def _unpack_codes(packed: Tensor, memory: Tensor | None) -> Tensor:
    """Codes (k, n) uint8 of B (k / 16, 2n) int32."""
    k, n = 16 * packed.shape[0], packed.shape[1] // 2
    codes = words.empty_codes(k, n, packed.device, memory)
    rows = codes.view(k // 16, 2, 8, n)
    packed = packed.contiguous()
    step = words.rows_per_slab(packed)
    octets, planes, wide, natural = _scratch(step, n, codes.device)
    blocks = torch.empty_like(natural).view(step, n // 64, 16, 8)
    for tiles in words.slabs(k // 16, step):
        m = tiles.stop - tiles.start
        blocks[:m].copy_(packed[tiles].view(m, n // 64, 8, 16).transpose(2, 3))
        by_block = blocks[:m].view(m, n // 64, 4, 32)
        natural[:m].view(m, 4, n // 64, 32).copy_(by_block.transpose(1, 2))
        for i, plane in enumerate(planes[:m].unbind(1)):
            words.take_octet(natural[:m], i, plane, wide[:m])
        _halves(octets[:m]).copy_(_by_half(planes[:m]))
        words.split_nibbles(octets[:m], rows[tiles, 0], rows[tiles, 1])
    return codes


def _scratch(step: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temporaries of a slab of step tile rows: octets in row order, octets in word order, words twice."""
    octets = torch.empty(step, 8, n, dtype=torch.uint8, device=device)
    planes = torch.empty(step, 4, 4, n // 2, dtype=torch.uint8, device=device)  # t, (kp, h), a, (J, j, c)
    wide = torch.empty(step, 4, n // 2, dtype=torch.int32, device=device)
    return octets, planes, wide, torch.empty_like(wide)


def _halves(octets: Tensor) -> Tensor:
    """Octets (t, (a, kp), (J, j, h, c)) as int64 of eight columns (t, kp, h, a, (J, j))."""
    t, _, n = octets.shape
    return octets.view(torch.int64).view(t, 4, 2, n // 16, 2).permute(0, 2, 4, 1, 3)


def _by_half(planes: Tensor) -> Tensor:
    """Planes (t, (kp, h), a, (J, j, c)) as int64 of eight columns (t, kp, h, a, (J, j))."""
    t, _, _, half = planes.shape
    return planes.view(torch.int64).view(t, 2, 2, 4, half // 8)


def quantization_config(fates: Sequence[Fate]) -> dict[str, Any]:
    """The quantization_config of config.json for our readers: AutoGPTQ's keys, quant_method "marlin".

    Where matrices differ in group size, those unlike most are named under `dynamic`, as GPTQModel does.
    """
    found = mixtures.kinds(fates)
    bits, group_size = mixtures.usual(found)
    config = {
        "quant_method": "marlin",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "marlin",
        "modules_to_not_convert": mixtures.left_dense(fates),
    }
    dynamic = dynamics.overrides(found, (bits, group_size))
    return config | ({"dynamic": dynamic} if dynamic else {})


def read_config(config: Mapping[str, Any], names: tuple[str, ...] = ()) -> Scheme:
    """The scheme of a config already known to mean this layout. FormatError for what it does not hold."""
    if not boolean(config, "sym", True) or boolean(config, "zero_point", False):
        raise FormatError(
            "quantization_config: not symmetric, and marlin has no zero points: they were dropped",
            hint="convert the model again from its original",
        )
    scheme = Scheme(
        "marlin",
        bits=bits_of(config, "bits", "w_bit", allowed=(4,), default=4),  # those of early 2024 do not say
        group_size=group_size_of(config, "group_size", "q_group_size"),
        names=names,
        skipped=names_of(config, "modules_to_not_convert"),
    )
    skipped, overrides = dynamics.by_layer(config, scheme, partial(read_config, names=names))
    return replace(scheme, skipped=(*scheme.skipped, *skipped), overrides=overrides)
