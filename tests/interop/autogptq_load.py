"""Weights of a GPTQ checkpoint as AutoGPTQ loads and applies them on a CPU.

usage: autogptq_load.py CHECKPOINT OUT.safetensors     (run by the Python of `environments.sh autogptq`)
"""

import sys
from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from identity import write_weights

checkpoint, out = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu").model
layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
write_weights(layers, {name: layer.infeatures for name, layer in layers.items()}, torch.float16, Path(out))
