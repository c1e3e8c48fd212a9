"""On-disk layouts of quantized linear layers: one module each, pack and unpack side by side."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from marlin_convert.errors import FormatError
from marlin_convert.formats import auto_round, awq, compressed_tensors, gptq, marlin, marlin_24
from marlin_convert.formats.scheme import Scheme

__all__ = ["FORMATS", "SHAPE", "Scheme", "detect"]

FORMATS: dict[str, ModuleType] = {
    "marlin": marlin,
    "marlin-24": marlin_24,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "awq": awq,
}

# The one tensor that says how many outputs there are; compressed-tensors has it.
SHAPE = "weight_shape"


# Other words for a method, and vLLM's for tensors that it repacks for a kernel as it loads them.
_METHODS = {
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
    "compressed_tensors": "compressed-tensors",
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
}

_START_OVER = "start from the model it was made from, or from its weights written out in 16 bits."


def detect(quantization_config: Mapping[str, Any]) -> Scheme:
    """The scheme that a quantization_config describes. FormatError naming what is unknown or refused."""
    try:
        return _detect(quantization_config)
    except FormatError as error:
        raise FormatError(str(error), error.hint or _START_OVER) from error


def method_of(config: Mapping[str, Any]) -> str | None:
    """What a quantization_config calls its method, in one word for each; None where it names none."""
    said = config.get("quant_method") or config.get("method") or _implied_method(config)
    return said and _METHODS.get(str(said).lower(), str(said).lower())


def _detect(config: Mapping[str, Any]) -> Scheme:
    method = method_of(config)
    if method == "compressed-tensors":
        scheme = compressed_tensors.read_config(config)
        return marlin_24.checked(scheme) if scheme.format == "marlin-24" else scheme
    if method == "auto-round":
        return auto_round.read_config(config)
    if method == "awq":
        if awq.awq_version(config) == "marlin":
            return marlin.read_config(config, names=("qweight", "scales"))
        return awq.read_config(config)
    # AutoGPTQ and vLLM call gptq what is stored in layouts for a kernel, and say which as checkpoint_format
    stored = gptq.checkpoint_format(config) if method == "gptq" else config.get("checkpoint_format", method)
    if method in ("gptq", "marlin") and stored == "marlin":
        return marlin.read_config(config)
    if method in ("gptq", "marlin_24") and stored == "marlin_24":
        return marlin_24.read_config(config)
    if method == "gptq":
        return gptq.read_config(config)
    if method is None:
        raise FormatError("quantization_config names no quant_method")
    raise FormatError(
        f"quantization_config: quant_method {method!r} is not supported",
        f"supported are {', '.join(FORMATS)} and auto-round; {_START_OVER}",
    )


def _implied_method(config: Mapping[str, Any]) -> str | None:
    """The method of configs that name none, like AutoAWQ's quant_config.json and old quantize_config.json."""
    if "w_bit" in config:
        return "awq"
    if "config_groups" in config:
        return "compressed-tensors"
    if "bits" in config and ("desc_act" in config or "sym" in config):
        return "gptq"
    return "mlx" if "bits" in config and "group_size" in config else None


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """The tensor suffixes that a packed linear may have in a checkpoint of this scheme, its codes first."""
    return scheme.names or FORMATS[scheme.format].SUFFIXES


def tensors(scheme: Scheme, k: int, n: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors of a linear (k, n) in a checkpoint of this scheme, by suffix."""
    stored = FORMATS[scheme.format].tensors(
        k, n, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric
    )
    return dict(zip(scheme.names or stored, stored.values(), strict=True))
