"""Weights as a peer's own layers apply them: each layer run on the identity matrix. For scripts run by a peer's Python."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


@torch.inference_mode()
def write_weights(layers: Mapping[str, torch.nn.Module], inputs: Mapping[str, int], out: Path) -> None:
    """Save the weight (n, k) of every layer, float16, under its name; a row of the identity picks a column exactly."""
    weights = {}
    for name, layer in layers.items():
        identity = torch.eye(inputs[name], dtype=torch.float16)
        bias = getattr(layer, "bias", None)
        weight = layer(identity) if bias is None else layer(identity) - bias
        weights[name] = weight.to(torch.float16).t().contiguous()
    if not weights:
        raise SystemExit("no quantized layer found")
    save_file(weights, out)
