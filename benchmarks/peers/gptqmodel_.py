"""Quantize with GPTQModel (GPTQ, 4 bits, groups of 128, symmetric) and say what it cost.

Run by the Python of `environments.sh gptqm`. `default` is the library's own default (group-aware activation order,
min-max scales); `best` adds the scale search it ships but leaves off. The trailing underscore of this file's name keeps
it from being imported in the library's place.
"""

import os

import measure

chosen = measure.arguments(__doc__, batch_size=8)
# Its loader asks for two workers and stops on a machine where its own default is one.
os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, chosen.threads))

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file

torch.set_num_threads(chosen.threads)
ids = load_file(chosen.tokens)["input_ids"]
search = {"mse": 2.0} if chosen.setting == "best" else {}
model = GPTQModel.load(chosen.model, QuantizeConfig(bits=4, group_size=128, sym=True, **search), device="cpu")
model.quantize(
    [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids],
    batch_size=chosen.batch_size,
)
model.save(str(chosen.out))
measure.report("GPTQModel", "gptqmodel", chosen.setting)
