"""Weights of a GPTQ checkpoint as GPTQModel loads and applies them on a CPU.

usage: gptqmodel_load.py CHECKPOINT OUT.safetensors     (run by the Python of `environments.sh gptqm`)
"""

import os
import sys
from pathlib import Path

# Its loader asks for two workers and stops on a machine where its own default is one.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
# Compiling each layer's dequantization costs more than everything else here.
os.environ["TORCH_COMPILE_DISABLE"] = "1"

import torch
from gptqmodel import BACKEND, GPTQModel
from identity import write_weights

checkpoint, out = sys.argv[1:]
# TORCH: the reference path; the fused CPU ones repack for bfloat16 processors and round differently.
model = GPTQModel.load(checkpoint, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
write_weights(layers, {name: layer.in_features for name, layer in layers.items()}, torch.float16, Path(out))
