"""Earlier manifests, which had no record for a matrix: lists, and words for all, instead."""

from collections.abc import Mapping
from typing import Any

from marlin_convert.matrix import Fate, Layout, Matrix, dense


def rows(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that today's manifest would have; what makes no sense of an old one is left out.

    `config` is the config.json beside it, which alone tells the bits. An old manifest does not say the shape
    of what was left dense: it is 0 here.
    """
    recipe, reasons = _object(manifest.get("recipe")), _object(manifest.get("unpruned"))
    sparse = manifest.get("sparsity") == "2:4"
    format, size = recipe.get("format"), recipe.get("group_size")
    width = bits(_object(config.get("quantization_config"))) or 4
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch.")
    if not isinstance(format, str) or type(size) is not int:
        return []
    found = []
    linears = manifest.get("linears")
    for row in linears if isinstance(linears, list) else ():
        if not (isinstance(row, dict) and isinstance(row.get("name"), str)):
            continue
        if type(row.get("k")) is not int or type(row.get("n")) is not int:
            continue
        matrix, reason = Matrix(row["name"], row["k"], row["n"]), _text(reasons.get(row["name"]))
        if format == "dense":
            fate = dense(matrix, dtype, sparse=sparse)
        else:
            own = "marlin" if format == "marlin-24" and reason is not None else format
            fate = Fate(matrix, Layout(own, width, size, sparse=sparse and reason is None), reason)
        results = ("error", "damping", "rounded_to_nearest")
        found.append(fate.row() | {key: row[key] for key in results if key in row})
    for name, why in _object(manifest.get("dense")).items():
        found.append(dense(Matrix(name, 0, 0), dtype, _text(why)).row())
    return found


def bits(config: Mapping[str, Any]) -> int | None:
    """Bits of a code as the quantization_config of any format says them, for want of a record; or None."""
    groups = list(_object(config.get("config_groups")).values()) or [{}]
    said = (
        config.get("bits")
        or config.get("w_bit")
        or _object(_object(groups[0]).get("weights")).get("num_bits")
        or (4 if config.get("quant_method") == "marlin" else None)  # those of early 2024 do not say
    )
    return int(str(said)) if str(said) in ("4", "8") else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
