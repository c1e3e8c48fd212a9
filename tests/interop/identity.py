"""Weights as a peer's own layers apply them: each layer is run on the identity matrix.

Imported by the scripts beside it, under a peer's Python.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


@torch.inference_mode()
def write_weights(
    layers: Mapping[str, torch.nn.Module], inputs: Mapping[str, int], dtype: torch.dtype, out: Path
) -> None:
    """Save the weight (n, k) of every layer under its name.

    dtype is the one the layers compute in. Nothing is rounded: each sum has but one term that is not zero.
    """
    weights = {}
    for name, layer in layers.items():
        columns = layer(torch.eye(inputs[name], dtype=dtype))
        if getattr(layer, "bias", None) is not None:
            columns = columns - layer.bias
        weights[name] = columns.t().contiguous()
    if not weights:
        raise SystemExit("no quantized layer found")
    save_file(weights, out)
