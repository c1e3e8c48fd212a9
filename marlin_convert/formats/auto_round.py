"""AutoRound's words over layouts of others: its packing_format says whether tensors are GPTQ's or AWQ's.

Source: intel/auto-round, export_to_autoround.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from marlin_convert.errors import FormatError
from marlin_convert.formats import awq, gptq
from marlin_convert.formats.scheme import Scheme, boolean, integer, mapping_of, pattern_of

# A key of extra_config with one of these is a pattern, found anywhere in the name; else it is a layer's name.
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")

# Bits from which a layer is not quantized.
_DENSE = 16


def read_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of the tensors. FormatError for what AutoRound packs otherwise."""
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round").lower()
    if not any(layout in packing for layout in ("gptq", "awq")):
        raise FormatError(
            f"quantization_config: AutoRound's packing_format {packing!r} is not supported",
            "export the model from AutoRound with format auto_round:auto_gptq, or start from its original.",
        )
    if (config.get("data_type") or "int") != "int":
        raise FormatError(f"quantization_config: data_type {config['data_type']!r}, must be int")
    scheme = _read(config, packing)
    named, matched = [], []
    for layer in mapping_of(config, "extra_config"):
        said = mapping_of(config["extra_config"], layer)
        settings = {**config, **{key: value for key, value in said.items() if value is not None}}
        if integer(settings, "bits") < _DENSE:
            other = _read(settings, packing)
            if _PATTERN.search(layer):
                matched.append((f".*(?:{pattern_of(layer)})", other))
            else:
                named.append((f"{re.escape(layer)}$", other))
    # a name goes before a pattern, and the first that matches counts, also where it changes nothing
    overrides = [*named, *matched] if any(other != scheme for _, other in named + matched) else []
    activations = integer(config, "act_bits", default=_DENSE)
    beyond = f"act_bits is {activations}: quantized activations" if activations < _DENSE else None
    return replace(scheme, overrides=tuple(overrides), beyond=beyond)


def _read(config: Mapping[str, Any], packing: str) -> Scheme:
    if "awq" in packing:
        return awq.read_config({**config, "version": "gemm", "zero_point": not boolean(config, "sym", True)})
    plain = {key: config.get(key) for key in ("bits", "group_size", "sym")}
    return gptq.read_config({**plain, "desc_act": False, "checkpoint_format": "gptq"})
