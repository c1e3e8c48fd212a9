"""compressed-tensors `pack-quantized`: the layout vLLM, SGLang and transformers prefer today.

    weight_packed      (n, ceil(k * bits / 32)) int32       unsigned codes, a bit stream along k
    weight_scale       (n, groups) float16
    weight_shape       (2,) int64                           n, k
    weight_zero_point  (ceil(n * bits / 32), groups) int32  unsigned zero codes, a bit stream along n
    weight_g_idx       (k,) int32                           in old files; -1 everywhere: none

A symmetric layer has no weight_zero_point. weight_packed, weight_scale and weight_zero_point are GPTQ's
qweight, scales and version 2 qzeros transposed.

Source: the compressed-tensors package, PackedQuantizationCompressor.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
    integer,
    mapping_of,
    names_of,
    pattern_of,
    tensor,
)
from marlin_convert.matrix import Fate
from marlin_convert.quantized import QuantizedLinear

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
# What it calls the tensors of marlin-24.
MARLIN_24_NAMES = ("weight_packed", "meta", "scale_packed")


def refusal(
    k: int,
    n: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    act_order: bool = False,
    least_zero: int = 0,
) -> str | None:
    """Why this layout cannot hold such a layer; None if it can."""
    if bits not in (4, 8):
        return f"holds 4 or 8 bits, not {bits}"
    if act_order:
        return "has no group order since 0.19, and the groups of the layer follow activation order"
    if group_size != -1 and k % group_size:
        return f"needs inputs divisible by the group size {group_size}, has {k}"
    return None


def tensors(
    k: int, n: int, *, bits: int, group_size: int, symmetric: bool = True
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor pack writes."""
    groups = groups_of(k, group_size)
    written: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (n, -(-k * bits // 32))),
        "weight_scale": (torch.float16, (n, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not symmetric:
        written["weight_zero_point"] = (torch.int32, (-(-n * bits // 32), groups))
    return written


def pack(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of a layer, by suffix: weight_zero_point only if it has zeros.

    FormatError when the layer is refused, a code or zero code does not fit the bits, or a scale is zero, not
    finite or not a float16 number.
    """
    reason = refusal(
        layer.k,
        layer.n,
        bits=layer.bits,
        group_size=layer.group_size,
        act_order=layer.group_of_row is not None,
    )
    if reason:
        raise FormatError(f"compressed-tensors {reason}")
    bounds.check_codes(layer)
    packed = {
        "weight_packed": words.pack_rows(layer.codes, layer.bits).t().contiguous(),
        "weight_scale": bounds.float16_scales(layer.scales).t().contiguous(),
        "weight_shape": torch.tensor([layer.n, layer.k], dtype=torch.int64, device=layer.codes.device),
    }
    if layer.zeros is not None:
        packed["weight_zero_point"] = words.pack_rows(layer.zeros.t(), layer.bits)
    return packed


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, memory: Tensor | None = None) -> QuantizedLinear:
    """The layer in weight_packed, weight_scale, weight_shape and what else there is of it.

    Its codes are put in memory, if that is given.
    FormatError when they do not fit together.
    """
    packed = tensor(tensors, "weight_packed", (torch.int32,))
    scales = tensor(tensors, "weight_scale", SCALE_DTYPES)
    shape = tensor(tensors, "weight_shape", (torch.int64, torch.int32), dimensions=1)
    expect_shape("weight_shape", shape, (2,), "any layer")
    n, k = shape.tolist()
    expect_shape("weight_packed", packed, (n, -(-k * scheme.bits // 32)), f"weight_shape {n, k}")
    expect_shape("weight_scale", scales, (n, scales.shape[1]), f"weight_shape {n, k}")
    group_size = scheme.group_rows(k, scales.shape[1])
    zeros, group_of_row = peculiarities(tensors, scheme, k, n)
    return QuantizedLinear.normalized(
        codes=words.unpack_rows(packed.t().contiguous(), scheme.bits, k, memory),
        scales=scales.t().contiguous(),
        group_size=group_size,
        bits=scheme.bits,
        zeros=zeros,
        group_of_row=group_of_row,
    )


def peculiarities(
    tensors: Mapping[str, Tensor], scheme: Scheme, k: int, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """The zero codes (groups, n) uint8 and the group of each row (k,), from the tensors of these alone.

    None where there are none; FormatError when they do not fit the layer.
    """
    shape = tensor(tensors, "weight_shape", (torch.int64, torch.int32), dimensions=1).tolist()
    if shape != [n, k]:
        raise FormatError(f"weight_shape is {shape}, the layer has {n} outputs and {k} inputs")
    groups = groups_of(k, scheme.group_size)
    zeros = None
    if "weight_zero_point" in tensors or not scheme.symmetric:
        stored = tensor(tensors, "weight_zero_point", (torch.int32,))
        rows = -(-n * scheme.bits // 32)
        expect_shape("weight_zero_point", stored, (rows, groups), f"a layer {k, n} of {groups} groups")
        zeros = words.unpack_rows(stored, scheme.bits, n).t().contiguous()
    return zeros, _group_of_row(tensors, scheme, k, groups)


def _group_of_row(tensors: Mapping[str, Tensor], scheme: Scheme, k: int, groups: int) -> Tensor | None:
    """The group of each row (k,) int32 as weight_g_idx says; None when there is none."""
    if "weight_g_idx" not in tensors:
        if scheme.act_order and groups > 1:
            raise FormatError(
                "actorder is group and there is no weight_g_idx: the group of each row is unknown"
            )
        return None
    g_idx = tensor(tensors, "weight_g_idx", (torch.int32, torch.int64), dimensions=1)
    expect_shape("weight_g_idx", g_idx, (k,), f"weight_shape of {k} inputs")
    if bool((g_idx == -1).all()):
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise FormatError(f"weight_g_idx runs from {low} to {high}, there are {groups} groups")
    return g_idx


def quantization_config(fates: Sequence[Fate]) -> dict[str, Any]:
    """The quantization_config of config.json, lm_head always ignored; vLLM refuses any sparsity_config.

    Matrices of one kind are a group; where there are several, each names its own by patterns.
    """
    symmetric = all(fate.layout.symmetric for fate in fates if fate.packed)
    told = mixtures.told(mixtures.kinds(fates))
    groups = {}
    for number, ((bits, group_size), names) in enumerate(told.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        groups[f"group_{number}"] = {
            "targets": [_CLASS] if len(told) == 1 else [f"re:{mixtures.pattern(name)}" for name in names],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", *(name for name in mixtures.left_dense(fates) if name != "lm_head")],
        "config_groups": groups,
    }


# Names that compressed-tensors takes for a group of its own making: a list of targets stands under them.
_PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"num_bits": 4, "strategy": "group", "group_size": 128},
    "W4A16_ASYM": {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False},
    "W8A16": {"num_bits": 8, "strategy": "channel"},
}


def read_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a compressed-tensors config: pack-quantized, or marlin-24 under other names.

    Groups of linears that are stored otherwise than the rest are its overrides. quantization_status is not
    read: tensors tell what is packed. FormatError for other formats, and for what is no static integer.
    """
    if mapping_of(config, "sparsity_config").get("format", "dense") != "dense":
        raise FormatError("quantization_config: sparsity_config: the weights are compressed a second time")
    if config.get("transform_config"):
        raise FormatError("quantization_config: transform_config is not supported")
    found = [
        (_read_group(config, group), names_of(group, "targets"))
        for group in map(
            partial(_group, mapping_of(config, "config_groups")), config.get("config_groups") or ()
        )
        if group.get("weights")  # others are of activations alone
    ]
    if not found:
        raise FormatError("quantization_config: no config group has weights")
    # a class of modules is everything that no name and no pattern speaks of
    general = next((scheme for scheme, targets in found if _CLASS in targets), found[0][0])
    overrides = [
        (_pattern(target), scheme)
        for scheme, targets in found
        for target in targets
        if target != _CLASS and scheme != general
    ]
    return replace(general, overrides=tuple(overrides))


_CLASS = "Linear"


def _group(groups: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A config group, written out where it is a preset."""
    if name in _PRESETS and isinstance(groups[name], list):
        return {"targets": groups[name], "weights": _PRESETS[name]}
    return mapping_of(groups, name)


def _pattern(target: str) -> str:
    """A target as a pattern for re.match: a name, or the end of one, matches whole."""
    if target.startswith("re:"):
        return pattern_of(target.removeprefix("re:"))
    return rf"(.*\.)?{re.escape(target)}$"


def _read_group(config: Mapping[str, Any], group: Mapping[str, Any]) -> Scheme:
    """The scheme of the linears of one group."""
    stored = group.get("format") or config.get("format") or "pack-quantized"
    if stored not in ("pack-quantized", "marlin-24"):
        raise FormatError(f"quantization_config: compressed-tensors format {stored!r} is not supported")
    weights = mapping_of(group, "weights")
    if (weights.get("type") or "int") != "int" or boolean(weights, "dynamic", False):
        raise FormatError("quantization_config: only static integer weights are supported")
    size = integer(weights, "group_size", default=-1)
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
    if strategy not in ("group", "channel"):
        raise FormatError(f"quantization_config: strategy {strategy!r} is not supported")
    asked = [key for key in ("input_activations", "output_activations") if group.get(key)]
    return Scheme(
        "marlin-24" if stored == "marlin-24" else "compressed-tensors",
        bits=bits_of(weights, "num_bits"),
        group_size=-1 if strategy == "channel" else group_size_of(weights, "group_size"),
        symmetric=boolean(weights, "symmetric", True),
        names=MARLIN_24_NAMES if stored == "marlin-24" else (),
        skipped=names_of(config, "ignore"),
        act_order=weights.get("actorder") not in (None, False, "weight", "static"),
        beyond=f"{asked[0]}: quantized activations" if asked else None,
    )
