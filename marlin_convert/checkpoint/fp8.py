"""Weights stored in fp8, read as the floats they mean: each value times the scale of its block.

    weight            (n, k) fp8
    weight_scale_inv  () or (1,) of the whole weight, (n, 1) of its outputs, or (ceil(n / rows),
    or weight_scale   ceil(k / columns)) of its blocks; a float each, multiplied with in spite of "inv"
    activation_scale  what an engine divides the inputs by before it rounds them to fp8 too: of no use here
    or input_scale

The weights of E experts may be stacked, (E, n, k) or turned over, (E, k, n), and their scales are then as
they lie: NAME_scale_inv or NAME_scale is (E, rows, columns), or (E,) of whole weights.

Sources: transformers' FineGrainedFP8, whose quant_method is "fp8", and compressed-tensors' float-quantized.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marlin_convert import formats
from marlin_convert.checkpoint.reader import TensorInfo
from marlin_convert.errors import SourceError
from marlin_convert.formats.scheme import mapping_of

CODES = ("F8_E4M3", "F8_E5M2")
SCALE_CODES = ("F32", "F16", "BF16", "F8_E8M0")
OF_WEIGHTS = ("_scale_inv", "_scale")
OF_INPUTS = ("activation_scale", "input_scale")

# Rows and columns of a weight that share a scale; None is all of them.
Block = tuple[int | None, int | None]
WHOLE: Block = (None, None)
OUTPUT: Block = (1, None)
TURNED_OVER: Block = (None, 1)  # of the outputs of experts, where those are the columns

# Where a config of transformers' says nothing of blocks, its own are meant, or none as vLLM takes it.
DEFAULT: Block = (128, 128)

# Values that are floats of 32 bits at once.
SLICE = 1 << 22

FETCH = "the source is damaged; fetch it again."


@dataclass(frozen=True)
class Scales:
    """The scales of one weight, or of a stack of them: their tensor, and what each of them covers.

    The weight may be some `rows` of a matrix that they are all of, `transposed` first where it is.
    """

    info: TensorInfo
    block: Block
    transposed: bool = False
    rows: range | None = None

    def __str__(self) -> str:
        if self.block in (WHOLE, OUTPUT, TURNED_OVER):
            return "fp8 with a scale " + ("a tensor" if self.block == WHOLE else "an output")
        return "fp8 with block scales"

    def of_expert(self, number: int, transposed: bool, rows: range) -> "Scales":
        """Those of some rows of one matrix of a stack."""
        count, *grid = self.info.shape
        size = (self.info.end - self.info.start) // count
        start = self.info.start + number * size
        info = replace(self.info, shape=(*grid, 1, 1)[:2], start=start, end=start + size)
        return Scales(info, self.block, transposed, rows)


def blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """What a scale may cover by this quantization_config; nothing where it says that weights are no fp8.

    SourceError when it says that they are, and makes no sense.
    """
    method = formats.method_of(config)
    if method == "fp8":
        if "weight_block_size" not in config:
            return (WHOLE, DEFAULT)
        size = config["weight_block_size"]
        return (WHOLE if size is None else _block(size, "weight_block_size"),)
    if method != "compressed-tensors" or any(
        config.get(key) for key in ("transform_config", "sparsity_config")
    ):
        return ()
    groups = mapping_of(config, "config_groups")
    weights = [mapping_of(mapping_of(groups, name), "weights") for name in groups]
    weights = [one for one in weights if one]  # others are of activations alone
    if not all(one.get("type") == "float" and one.get("num_bits") == 8 for one in weights):
        return ()
    return tuple(dict.fromkeys(_of_group(one) for one in weights))


def _of_group(weights: Mapping[str, Any]) -> Block:
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block(weights.get("block_structure"), "block_structure")
    if strategy not in ("tensor", "channel"):
        raise SourceError(
            f"quantization_config: strategy {strategy!r} of fp8 weights is not read.",
            "tensor, channel and block are; start from the model it was made from.",
        )
    return WHOLE if strategy == "tensor" else OUTPUT


def _block(size: Any, key: str) -> Block:
    if not (isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)):
        raise SourceError(
            f"quantization_config: {key} is {size!r}, not two positive numbers.", "fetch config.json again."
        )
    return (size[0], size[1])


def pair(
    tensors: Mapping[str, TensorInfo], allowed: tuple[Block, ...]
) -> tuple[dict[str, TensorInfo], dict[str, Scales]]:
    """The tensors without what belongs to fp8 weights, and the scales of every such weight, by its name.

    SourceError, from the headers, for a weight without scales, or with scales that are not of its shape.
    """
    scales = {
        name: _scales(name, info, tensors, allowed) for name, info in tensors.items() if info.code in CODES
    }
    gone = {name + suffix for name in scales for suffix in OF_WEIGHTS}
    for name in scales:
        stacked = len(tensors[name].shape) > 2
        of = f"{name}_" if stacked else f"{name.rpartition('.')[0]}."
        gone |= {of + suffix for suffix in OF_INPUTS}
    return {name: info for name, info in tensors.items() if name not in gone}, scales


def _scales(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], allowed: tuple[Block, ...]
) -> Scales:
    found = [name + suffix for suffix in OF_WEIGHTS if name + suffix in tensors]
    if len(found) != 1:
        said = "both " + " and ".join(found) if found else f"no {name}{OF_WEIGHTS[0]} or {OF_WEIGHTS[1]}"
        raise SourceError(f"{name} is stored in fp8, and there is {said}.", "fetch the model again.")
    scale = tensors[found[0]]
    if len(info.shape) not in (2, 3) or not all(info.shape) or scale.code not in SCALE_CODES:
        raise SourceError(
            f"{name} of shape {info.shape} is stored in fp8 with scales in {scale.code}; read are matrices, "
            f"alone or stacked, with scales in {', '.join(SCALE_CODES)}.",
            "start from the model it was made from.",
        )
    experts = info.shape[:-2]  # how many are stacked, if they are
    shape = (*experts, 1, 1) if math.prod(scale.shape) == math.prod(experts) else scale.shape
    if experts and OUTPUT in allowed:
        allowed = (*allowed, TURNED_OVER)
    grids = {block: (*experts, *_grid(info.shape[-2:], block)) for block in allowed}
    for block, grid in grids.items():
        if grid == shape:
            return Scales(scale, block)
    meant = " or ".join(str(grid) for grid in dict.fromkeys(grids.values()))
    raise SourceError(
        f"{found[0]} has shape {scale.shape}; the config, and a weight of shape {info.shape}, mean {meant}.",
        "the config.json may be of another model; fetch the model again.",
    )


def _grid(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """How many scales there are along both sides."""
    return tuple(-(-size // (share or size)) for size, share in zip(shape, block, strict=True))


def read_scales(scales: Scales) -> Tensor:
    """The scales as a grid of float32, (rows, columns); SourceError for one that is none."""
    found = scales.info.read().float()
    wrong = int((~(found.isfinite() & (found > 0))).sum())
    if wrong:
        raise SourceError(
            f"{scales.info.name} holds {wrong} of {found.numel()} scales that are NaN, infinite, zero or "
            "negative.",
            FETCH,
        )
    return found.reshape(1, 1) if found.dim() < 2 else found


def read(stored: TensorInfo, scales: Scales, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight (n, k) in `dtype`, multiplied on the device in float32, some rows at a time, and rounded once.

    SourceError where it is not finite, or its scales are none.
    """
    grid, values = read_scales(scales).to(device), stored.read().to(device)
    block = scales.block
    if scales.transposed:
        grid, block = grid.T, block[::-1]
    n, k = values.shape
    lie = scales.rows or range(n)  # where its rows are in what the scales are of
    rows, columns = block[0] or lie.stop, block[1] or k
    place = torch.arange(lie.start, lie.stop, lie.step, device=device) // rows
    weight = torch.empty(n, k, dtype=dtype, device=device)
    step = max(1, SLICE // k)
    for start in range(0, n, step):
        part = values[start : start + step].float()
        part *= grid[place[start : start + step]].repeat_interleave(columns, 1)[:, :k]
        weight[start : start + step] = part
        if not weight[start : start + step].isfinite().all():
            if not part.isfinite().all():
                raise SourceError(f"{stored.name} holds NaN or Inf.", FETCH)
            raise SourceError(
                f"{stored.name} does not fit {str(dtype).removeprefix('torch.')}: its largest value is "
                f"{part.abs().max()}.",
                "make config.json say dtype bfloat16, which reaches further.",
            )
    return weight
