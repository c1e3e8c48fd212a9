"""GPTQ checkpoints as AutoGPTQ (v1) and GPTQModel (v1, v2) write them, read by vLLM and SGLang.

    qweight  (k * bits / 32, n) int32      codes, a bit stream along k
    qzeros   (groups, n * bits / 32) int32 zero codes, a bit stream along n; v1 stores them minus one
    scales   (groups, n) float16
    g_idx    (k,) int32                    group of each row

Source: AutoGPTQ/AutoGPTQ qlinear_cuda.py, ModelCloud/GPTQModel.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    tensor,
)
from marlin_convert.matrix import Fate
from marlin_convert.quantized import QuantizedLinear, contiguous_groups

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def refusal(
    k: int,
    n: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    act_order: bool = False,
    least_zero: int = 1,
) -> str | None:
    """Why this layout, in version 1, cannot hold such a layer; None if it can. AutoGPTQ's own limits."""
    if bits not in (4, 8):
        return f"holds 4 or 8 bits, not {bits}"
    if k % 32:
        return f"needs inputs divisible by 32, has {k}"
    if n % 32:
        return f"needs outputs divisible by 32, has {n}"
    if least_zero < 1:
        return "stores zero points minus one, and some of the layer are 0"
    return None


def tensors(
    k: int, n: int, *, bits: int, group_size: int, symmetric: bool = True
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor pack writes."""
    groups = groups_of(k, group_size)
    return {
        "qweight": (torch.int32, (k * bits // 32, n)),
        "qzeros": (torch.int32, (groups, n * bits // 32)),
        "scales": (torch.float16, (groups, n)),
        "g_idx": (torch.int32, (k,)),
    }


def pack(layer: QuantizedLinear, *, version: int = 1) -> dict[str, Tensor]:
    """The four tensors of a layer, by suffix, zeros in version 1 or 2.

    FormatError when the shape is refused, a code or zero code does not fit the bits, a scale is zero, not
    finite or not a float16 number, or a zero code is 0 in version 1, which stores it minus one.
    """
    reason = refusal(layer.k, layer.n, bits=layer.bits, group_size=layer.group_size)
    if reason:
        raise FormatError(f"gptq {reason}")
    bounds.check_codes(layer)
    scales = bounds.float16_scales(layer.scales)
    zeros = layer.zeros
    if zeros is None:
        zeros = torch.full(layer.scales.shape, 1 << (layer.bits - 1), dtype=torch.uint8, device=scales.device)
    if version == 1:
        bounds.check_zeros_above(zeros, 1, "are 0, which version 1 (stored minus one) cannot hold")
        zeros = zeros - 1
    g_idx = layer.group_of_row
    if g_idx is None:
        g_idx = contiguous_groups(layer.k, layer.group_size, layer.codes.device)
    return {
        "qweight": words.pack_rows(layer.codes, layer.bits),
        "qzeros": words.pack_columns(zeros, layer.bits),
        "scales": scales,
        "g_idx": g_idx.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, memory: Tensor | None = None) -> QuantizedLinear:
    """The layer in qweight, qzeros, scales and g_idx, if there; its codes in memory, if that is given.

    FormatError when they do not fit together.
    """
    qweight = tensor(tensors, "qweight", (torch.int32,))
    scales = tensor(tensors, "scales", SCALE_DTYPES)
    k, n = qweight.shape[0] * 32 // scheme.bits, qweight.shape[1]
    expect_shape("scales", scales, (scales.shape[0], n), f"qweight {tuple(qweight.shape)}")
    group_size = scheme.group_rows(k, scales.shape[0], ragged=True)
    zeros, group_of_row = peculiarities(tensors, scheme, k, n)
    return QuantizedLinear.normalized(
        codes=words.unpack_rows(qweight, scheme.bits, k, memory),
        scales=scales,
        group_size=group_size,
        bits=scheme.bits,
        zeros=zeros,
        group_of_row=group_of_row,
    )


def peculiarities(
    tensors: Mapping[str, Tensor], scheme: Scheme, k: int, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """The zero codes (groups, n) uint8 and the group of each row (k,), from qzeros and g_idx alone.

    None where there are none; FormatError when they do not fit the layer.
    """
    groups = groups_of(k, scheme.group_size)
    qzeros = tensor(tensors, "qzeros", (torch.int32,))
    expect_shape("qzeros", qzeros, (groups, -(-n * scheme.bits // 32)), f"a layer {k, n} of {groups} groups")
    return _zeros(qzeros, scheme, n), _group_of_row(tensors, scheme, k, groups)


def _zeros(qzeros: Tensor, scheme: Scheme, n: int) -> Tensor | None:
    """The zero codes (groups, n) uint8; None when symmetric."""
    # of a symmetric layer all words are one, so that one need be taken apart
    least, most = torch.aminmax(qzeros)
    if scheme.symmetric and bool(least == most):
        word = words.unpack_columns(qzeros[:1, :1], scheme.bits, min(n, 32 // scheme.bits))
        # files exist that say v1 and store v2; this betrays it, whatever version the config claims
        middle = 1 << (scheme.bits - 1)
        if bool((word == middle - 1).all()) or bool((word == middle).all()):
            return None
    fields = words.unpack_columns(qzeros, scheme.bits, n)
    if scheme.version == 2:
        return fields
    # version 1 adds one: some readers make a stored 15 zero 16, others zero 0
    bounds.check_zeros_below(
        fields, (1 << scheme.bits) - 1, "are stored so that version 1 readers disagree on them"
    )
    return fields + 1


def _group_of_row(tensors: Mapping[str, Tensor], scheme: Scheme, k: int, groups: int) -> Tensor | None:
    """The group of each row (k,) int32 as g_idx says; None when there is no g_idx, or it says nothing."""
    if "g_idx" not in tensors:
        if scheme.act_order and groups > 1:
            raise FormatError("desc_act is true and there is no g_idx: the group of each row is unknown")
        return None
    g_idx = tensor(tensors, "g_idx", (torch.int32, torch.int64), dimensions=1)
    expect_shape("g_idx", g_idx, (k,), f"qweight of {k} inputs")
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < -groups or high >= groups:
        raise FormatError(f"g_idx runs from {low} to {high}, there are {groups} groups")
    if groups > 1 and low == high == 0:
        return None  # those who wrote it left it at that: of several groups, one cannot be of all rows
    # GPTQModel counts negative groups from the end
    return torch.where(g_idx < 0, g_idx + groups, g_idx)


def quantization_config(fates: Sequence[Fate]) -> dict[str, Any]:
    """The quantization_config of config.json as vLLM, SGLang, AutoGPTQ and GPTQModel read it.

    Where matrices differ in bits or group size, those unlike most are named under `dynamic`.
    """
    found = mixtures.kinds(fates)
    bits, group_size = mixtures.usual(found)
    packed = [fate.layout for fate in fates if fate.packed]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": all(layout.symmetric for layout in packed),
        "desc_act": any(layout.act_order for layout in packed),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in mixtures.left_dense(fates)}
    dynamic |= dynamics.overrides(mixtures.with_fused(found), (bits, group_size))
    if dynamic:
        config["dynamic"] = dynamic
    return config


def read_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a GPTQ quantization_config. FormatError for what this layout does not hold."""
    stored = checkpoint_format(config)
    if stored not in ("gptq", "gptq_v2"):
        raise FormatError(f"quantization_config: gptq checkpoint format {stored!r} is not supported")
    for key in ("rotation", "adapter", "pack_dtype"):
        value = config.get(key)
        if value and (key, str(value)) not in (("pack_dtype", "int32"), ("pack_dtype", "torch.int32")):
            raise FormatError(f"quantization_config: {key} {value!r} is not supported")
    scheme = Scheme(
        "gptq",
        bits=bits_of(config, "bits"),
        group_size=group_size_of(config, "group_size"),
        symmetric=boolean(config, "sym", True),
        version=2 if stored == "gptq_v2" else 1,
        act_order=boolean(config, "desc_act", False),
    )
    skipped, overrides = dynamics.by_layer(config, scheme, read_config)
    return replace(scheme, skipped=skipped, overrides=overrides)


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """The checkpoint format under its three spellings, "gptq" without any. FormatError when two disagree."""
    spelled = {key: config[key] for key in ("format", "checkpoint_format") if config.get(key)}
    if config.get("is_marlin_format"):
        spelled["is_marlin_format"] = "marlin"
    said = {str(value).lower() for value in spelled.values()}
    if len(said) > 1:
        raise FormatError(f"quantization_config contradicts itself: {spelled}")
    return next(iter(said), "gptq")
