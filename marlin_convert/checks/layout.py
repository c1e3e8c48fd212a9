"""Packed tensors that unpacking and packing leaves as they are; shapes and groups that engines load."""

from collections import Counter
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from marlin_convert import formats
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checks.outcome import Check, reporting, verdict
from marlin_convert.checks.subject import Subject
from marlin_convert.errors import ConvertError
from marlin_convert.models.discover import discover
from marlin_convert.quantized import QuantizedLinear


@reporting
def check(problems: list[str], subject: Subject) -> Check:
    """Unpack and pack every packed linear, and hold shapes and groups against the architecture."""
    weights, model = subject.weights, subject.model
    linears = weights.packed_linears()
    if not linears:
        return Check("skipped", "no linear is packed")
    problems += _shape_problems(weights, model)
    problems += _stage_problems(weights, model)
    notes = set()
    for found, note in subject.ranks.each(linears, lambda linear: _problems(linear, weights, model)):
        problems += found
        notes |= {note} if note else set()
    kinds = Counter(weights.scheme_of(linear).format for linear in linears)
    counted = " and ".join(f"{count} {format}" for format, count in kinds.items())
    summary = "; ".join([f"{counted} linears", *sorted(notes)])
    return verdict(problems, summary, linears=len(linears), notes=sorted(notes))


def _shape_problems(weights: Weights, model: PreTrainedModel) -> list[str]:
    """Dense tensors whose shape is not the architecture's."""
    tensors = weights.checkpoint.tensors
    return [
        f"{name} has shape {tensors[name].shape}, its config.json means {tuple(expected.shape)}"
        for name, expected in model.state_dict().items()
        if name in tensors and tensors[name].shape != tuple(expected.shape)
    ]


def _stage_problems(weights: Weights, model: PreTrainedModel) -> list[str]:
    """Linears that engines fuse into one (q, k and v; gate and up) packed in part, or in two layouts."""
    structure = discover(model)
    problems = []
    for number in range(len(structure.parts)):
        for stage in structure.stages(number):
            names = [f"{structure.blocks}.{number}.{path}" for path in stage]
            dense = [name for name in names if not weights.is_packed(name)]
            if dense and len(dense) < len(names):
                problems.append(f"{' and '.join(dense)} dense, what engines fuse with it packed")
            layouts = {weights.scheme_of(name).format: name for name in names if weights.is_packed(name)}
            if len(layouts) > 1:
                found = " and ".join(f"{name} {format}" for format, name in layouts.items())
                problems.append(f"{found}, which engines fuse")
    return problems


def _problems(linear: str, weights: Weights, model: PreTrainedModel) -> tuple[list[str], str | None]:
    """What is wrong with a packed linear, and what of it could not be compared."""
    problems = []
    try:
        layer = weights.quantized(linear)
        problems += _linear_problems(linear, layer, model)
        found, note = _repack_problems(linear, layer, weights)
    except ConvertError as error:
        return [*problems, str(error)], None
    return problems + found, note


def _linear_problems(linear: str, layer: QuantizedLinear, model: PreTrainedModel) -> list[str]:
    problems = []
    try:
        module = model.get_submodule(linear)
    except AttributeError:
        return [f"{linear} is not in the architecture"]
    expected = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if (layer.k, layer.n) != expected:
        problems.append(
            f"{linear} has {layer.k} inputs and {layer.n} outputs, its config.json means {expected}"
        )
    if layer.group_of_row is not None:
        problems.append(
            f"{linear}: the groups of g_idx are not runs of {layer.group_size} rows; vLLM ignores them"
        )
    return problems


def _repack_problems(linear: str, layer: QuantizedLinear, weights: Weights) -> tuple[list[str], str | None]:
    """Tensors that unpacking and packing changes, and what could not be compared."""
    scheme = weights.scheme_of(linear)
    layout = formats.FORMATS[scheme.format]
    if not hasattr(layout, "pack"):
        return [], f"{scheme.format} is never written, so not packed again"
    note = None
    if layer.scales.dtype != torch.float16:
        note = f"scales are {str(layer.scales.dtype).removeprefix('torch.')}, only codes are compared"
        layer = replace(layer, scales=torch.ones_like(layer.scales, dtype=torch.float16))
    try:
        version = {"version": scheme.version} if scheme.format == "gptq" else {}
        packed = layout.pack(layer, **version)
    except ConvertError as error:
        return [f"{linear}: {error}"], note
    again = dict(zip(scheme.names or packed, packed.values(), strict=True))
    changed = []
    for suffix, name in weights.stored(linear).items():
        stored = weights.checkpoint.read(name)
        if note and stored.is_floating_point():
            continue
        if suffix in again and not torch.equal(stored, again[suffix].to(stored.dtype)):
            changed.append(f"{name} is not what packing its codes again gives")
    return changed, note
