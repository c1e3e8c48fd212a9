"""The story of `inspect`: what a checkpoint contains, from its headers and JSON files alone."""

import re
import shlex
from math import prod
from typing import Any

from marlin_convert import provenance
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint import older_manifest
from marlin_convert.checkpoint.reader import Checkpoint, TensorInfo, json_file
from marlin_convert.errors import printable
from marlin_convert.hub import Source
from marlin_convert.matrix import Fate

# The suffix of its codes tells the format of a packed linear, but for GPTQ's and AWQ's. Not asked of the
# formats themselves: they import torch, which takes longer than everything that is done here.
CODES = {"B": "marlin", "B_24": "marlin-24", "weight_packed": "compressed-tensors", "qweight": None}

_IN_A_BLOCK = re.compile(r"\.\d+\..*\.weight$")
_SHOWN = 10


def inspect(source: Source) -> dict[str, Any]:
    """What the headers and JSON files of a checkpoint say; SourceError if they are not a checkpoint's."""
    directory = source.directory
    checkpoint = Checkpoint.open(directory, source.remote.files if source.remote else None)
    manifest = manifests.load(directory) or {}
    config = checkpoint.quantization_config or {}
    fates, bits = manifests.fates(manifest), older_manifest.bits(config)
    linears: dict[str, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        linears.setdefault(info.name.rpartition(".")[0], []).append(info)
    packed = {
        name: _packed(infos, fates.get(name), bits)
        for name, infos in linears.items()
        if _codes(infos) and (bits or name in fates)
    }
    weights = sum(one["weights"] for one in packed.values())
    stored = sum(one["bytes"] for one in packed.values())
    formats = [one["format"] or config.get("quant_method") for one in packed.values()]
    format = "marlin-24" if "marlin-24" in formats else next(iter(formats), None)
    reasons = {name: fate.reason for name, fate in fates.items()}
    pruned = [name for name, fate in fates.items() if fate.pruned]
    sparse = format == "marlin-24" or manifests.sparsity(manifest) is not None
    return {
        "name": source.name,
        "commit": source.commit,
        "model_type": checkpoint.config.get("model_type"),
        "format": format,
        "bits": sorted({one["bits"] for one in packed.values()}) or None,
        "group_sizes": sorted({one["group_size"] for one in packed.values()}),
        "sparsity": manifests.SPARSITY if sparse else None,
        "packed": len(packed),
        "unpruned": _unpruned(packed, format, reasons),
        "bits_per_weight": round(8 * stored / weights, 4) if weights else None,
        "pruned": pruned,
        "dense": _dense(checkpoint, reasons, pruned),
        "tensors": len(checkpoint.tensors),
        "shards": len(checkpoint.weight_files),
        "bytes": source.remote.nbytes
        if source.remote
        else sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        **{key: manifest.get(key) for key in ("tool", "source", "recipe", "calibration")},
        "history": provenance.earlier(directory)[:-1],
        "original": _original(manifest),
        "rounded_to_nearest": manifests.rounded_to_nearest(manifest),
        "verified": _verified(source),
    }


def _codes(infos: list[TensorInfo]) -> TensorInfo | None:
    """The codes among the tensors of a module, if it is packed."""
    return next((info for info in infos if info.name.rpartition(".")[2] in CODES), None)


def _packed(infos: list[TensorInfo], fate: Fate | None, bits: int | None) -> dict[str, Any]:
    """Format, bits, weights, bytes and group size of a packed linear, as its fate or its shapes tell."""
    own = [info for info in infos if not info.name.endswith(".bias")]
    stored = sum(info.end - info.start for info in own)
    if fate is not None:
        layout, weights = fate.layout, fate.k * fate.n
        told = {"format": layout.format, "bits": layout.bits, "group_size": layout.group_size}
        return told | {"weights": weights, "bytes": stored}
    codes = _codes(infos)
    assert codes is not None and bits
    suffix = codes.name.rpartition(".")[2]
    format = CODES[suffix]
    if any(info.name.endswith(".scale_packed") for info in infos):
        format = "marlin-24"
    # of four weights two are there, for a bit each the metadata says which
    weights = prod(codes.shape) * 32 // bits * (2 if format == "marlin-24" else 1)
    scales = next(
        (info for info in own if info.code in ("F16", "BF16", "F32") and len(info.shape) == 2), None
    )
    rows = None
    if scales is not None and scales.end > scales.start:
        groups = scales.shape[1 if format == "compressed-tensors" else 0]
        rows = -1 if groups == 1 else weights // prod(scales.shape)
    return {
        "format": format,
        "bits": bits,
        "weights": weights,
        "bytes": stored,
        "group_size": rows or 0,
    }


def _unpruned(
    packed: dict[str, dict[str, Any]], format: str | None, reasons: dict[str, str | None]
) -> dict[str, str | None]:
    """The packed linears that are not 2:4 while others are, and why, where the manifest says."""
    if format == "marlin-24":
        return {name: reasons.get(name) for name, one in packed.items() if one["format"] != format}
    return {name: reason for name, reason in reasons.items() if name in packed and reason}


def _dense(
    checkpoint: Checkpoint, reasons: dict[str, str | None], pruned: list[str]
) -> dict[str, str | None]:
    """The matrices of the blocks that are not packed or pruned, and why, where the manifest says."""
    names = [
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2 and _IN_A_BLOCK.search(name)
    ]
    known = set(pruned)
    return {name: reasons.get(name) for name in names if name not in known}


def _original(manifest: dict[str, Any]) -> str | None:
    """What it was made from in the first place, None if the manifest does not say."""
    try:
        return provenance.original(manifest)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _verified(source: Source) -> dict[str, Any] | None:
    """The last verification, and whether it was of the manifest that is there now."""
    if not (source.directory / manifests.VERIFIED).exists():
        return None
    report = json_file(source.directory, manifests.VERIFIED)
    path = source.directory / manifests.MANIFEST
    return {
        "passed": manifests.is_verified(report),
        "of_these_files": path.is_file() and manifests.sha256_file(path) == report.get("manifest_sha256"),
        "checks": {
            name: _object(check).get("status") for name, check in _object(report.get("checks")).items()
        },
    }


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def text(found: dict[str, Any], checkpoint: str, *, verbose: bool = False) -> str:
    """The contents for a reader; the last line is the next command to type."""
    bits = " and ".join(map(str, found["bits"] or ()))
    sizes = ", ".join("one per column" if size == -1 else str(size) for size in found["group_sizes"])
    lines = [f"{found['name']}: {found['model_type']}"]
    if found["packed"]:
        lines += [
            f"format       {found['format']}, {bits} bits, group size {sizes}",
            f"packed       {found['packed']} linears, {found['bits_per_weight']} bits per weight",
        ]
    if found["pruned"]:
        lines.append(f"{found['sparsity']:12} {len(found['pruned'])} linears, dense")
    elif found["sparsity"]:
        sparse = found["packed"] - len(found["unpruned"])
        others = ", the others are marlin" if found["unpruned"] and found["format"] == "marlin-24" else ""
        lines.append(f"{found['sparsity']:12} {sparse} of {found['packed']} linears{others}")
        lines += _listed(found["unpruned"], verbose)
    lines.append(f"left dense   {len(found['dense'])} matrices of the blocks")
    lines += _listed(found["dense"], verbose)
    lines.append(
        f"on disk      {found['bytes'] / 1e6:,.1f} MB, "
        f"{found['tensors']} tensors in {found['shards']} weight files"
    )
    if found["tool"]:
        source, recipe = _object(found["source"]), _object(found["recipe"])
        commit = f" at {source['commit']}" if source.get("commit") else ""
        lines.append(f"made by      {found['tool']} from {source.get('name')}{commit}")
        if found["original"] not in (None, f"{source.get('name')}{commit}"):
            lines.append(f"original     {found['original']}")
        lines.append("recipe       " + ", ".join(f"{key} {value}" for key, value in recipe.items()))
    lines += [f"  rounded to nearest: {name}" for name in found["rounded_to_nearest"]]
    lines.append(f"verified     {_verdict(found['verified'])}")
    if not (found["verified"] and found["verified"]["of_these_files"]):
        lines.append(f"Next: marlin-convert verify {shlex.quote(checkpoint)}")
    return "\n".join(printable(line) for line in lines)


def _listed(reasons: dict[str, str | None], verbose: bool) -> list[str]:
    """A line for each name and its reason; of many only the first, unless verbose."""
    lines = [f"  {name}{f': {reason}' if reason else ''}" for name, reason in reasons.items()]
    if verbose or len(lines) <= _SHOWN:
        return lines
    return [*lines[:_SHOWN], f"  ... {len(lines) - _SHOWN} more with -v"]


def _verdict(verified: dict[str, Any] | None) -> str:
    if verified is None:
        return "not yet"
    if not verified["of_these_files"]:
        return "not since the manifest changed"
    checks = ", ".join(f"{name} {status}" for name, status in verified["checks"].items())
    return f"{'passed' if verified['passed'] else 'not passed'} ({checks})"
