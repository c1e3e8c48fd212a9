"""The weights that each of two ranks of vLLM gets of a checkpoint's first block, one rank after the other.

usage: vllm_parts.py CHECKPOINT OUT.safetensors     (run by the Python of `environments.sh vllm`)

The tensors of a linear go through vLLM's own loaders: half of the inputs ("rows") or of the outputs
("columns") to a rank, or half of the outputs twice, as if two of these linears were one ("fused").
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor import parameter

from marlin_convert import formats
from marlin_convert.errors import SourceError
from marlin_convert.integrations.vllm_linear import MarlinLinearMethod

checkpoint, out = map(Path, sys.argv[1:])
scheme = formats.detect(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
tensors = load_file(checkpoint / "model.safetensors")
linears = {name.rpartition(".")[0] for name in tensors if ".0." in name and name.endswith(".s")}
suffixes = formats.suffixes(scheme)
ROWS = {"marlin": 16, "marlin-24": 32}[scheme.format]


def load(into, tensor, part, n):
    """What vLLM's row parallel, column parallel and merged linears do with a tensor of n outputs."""
    if part == "rows":
        into.load_row_parallel_weight(tensor)
    elif part == "columns":
        into.load_column_parallel_weight(tensor)
    else:
        for shard in (0, n // 2):
            into.load_merged_column_weight(tensor, shard_offset=shard, shard_size=n // 2)


def weight_of(linear, part, rank, left_out=None):
    """The dequantized weight of a rank's part."""
    stored = {suffix: tensors[f"{linear}.{suffix}"] for suffix in suffixes}
    codes, *_, scales = stored.values()
    k, n = ROWS * codes.shape[0], scales.shape[1]
    inputs, outputs = {"rows": (k // 2, [n]), "columns": (k, [n // 2]), "fused": (k, [n // 2] * 2)}[part]
    layer, method = nn.Module(), MarlinLinearMethod(scheme, linear)
    with (
        patch.object(parameter, "get_tensor_model_parallel_rank", lambda: rank),
        patch.object(parameter, "get_tensor_model_parallel_world_size", lambda: 2),
    ):
        method.create_weights(layer, inputs, outputs, k, n, torch.float32, weight_loader=load)
    for suffix, tensor in stored.items():
        if suffix != left_out:
            into = getattr(layer, suffix)
            into.weight_loader(into, tensor, part, n)
    method.process_weights_after_loading(layer)
    return layer.weight.data


def refused(linear, left_out):
    """What is said of a checkpoint that lacks a tensor of a linear."""
    try:
        weight_of(linear, "columns", 0, left_out)
    except SourceError as error:
        return str(error)
    return "nothing"


def lora_device(linear):
    """Where vLLM's own function puts the LoRA beside a linear as a GPU keeps it; here on meta."""
    method, layer = MarlinLinearMethod(scheme, linear), nn.Module()
    layer.register_parameter("bias", nn.Parameter(torch.zeros(1)))
    method.keep(layer, {suffix: tensors[f"{linear}.{suffix}"].to("meta") for suffix in suffixes})
    return _get_lora_device(layer).type


weights = {
    f"{linear}.{part}.{rank}": weight_of(linear, part, rank)
    for linear in linears
    for part in ("rows", "columns", "fused")
    for rank in (0, 1)
}
one = min(linears)
said = {f"without {suffix}": refused(one, suffix) for suffix in suffixes}
save_file(weights, out, {**said, "lora": lora_device(one)})
