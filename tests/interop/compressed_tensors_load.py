"""Weights of a compressed-tensors checkpoint as transformers loads and compressed-tensors decompresses them.

usage: compressed_tensors_load.py CHECKPOINT OUT.safetensors     (run by the Python of `environments.sh llmc`)
"""

import sys
from pathlib import Path

import torch
from identity import write_weights
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

checkpoint, out = sys.argv[1:]
# float16 whatever the model was: loading gives the scales the model's dtype, and bfloat16 would round ours.
model = AutoModelForCausalLM.from_pretrained(
    checkpoint, dtype=torch.float16, quantization_config=CompressedTensorsConfig(dequantize=True)
)
layers = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
write_weights(layers, {name: layer.in_features for name, layer in layers.items()}, torch.float16, Path(out))
