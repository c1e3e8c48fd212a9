"""A tiny Llama packed by AutoGPTQ itself, and its weights as AutoGPTQ's layers compute them.

usage: autogptq_pack.py KIND OUT     (run by the Python of `environments.sh autogptq`)

Writes OUT/checkpoint, a directory AutoGPTQ loads, and OUT/weights.safetensors. Scales and zero points are
those of plain rounding: AutoGPTQ's solver needs a GPU, its packers do not.
"""

import argparse
from pathlib import Path

import torch
from auto_gptq.modeling import BaseQuantizeConfig
from auto_gptq.modeling._utils import pack_model
from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import qlinear_marlin
from identity import write_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP_SIZE = 128

KINDS = ("symmetric", "asymmetric", "act-order", "asymmetric-act-order", "marlin")

parser = argparse.ArgumentParser()
parser.add_argument("kind", choices=KINDS)
parser.add_argument("out", type=Path)
chosen = parser.parse_args()
asymmetric, act_order = "asymmetric" in chosen.kind, "act-order" in chosen.kind

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        torch_dtype="float16",
    )
).half()


def round_to_nearest(linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round the weight in place; its scales and zero codes (n, groups) and the group of each column (k,)."""
    weight = linear.weight.data
    n, k = weight.shape
    group_of = torch.arange(k) // GROUP_SIZE
    if act_order:
        group_of = group_of[torch.randperm(k)]
    scales = torch.empty(n, k // GROUP_SIZE, dtype=torch.float16)
    zeros = torch.full_like(scales, 8)
    for group in range(k // GROUP_SIZE):
        columns = weight[:, group_of == group].float()
        low, high = columns.amin(1), columns.amax(1)
        scale = ((high - low) / 15 if asymmetric else columns.abs().amax(1) / 7).half()
        if asymmetric:
            # 0 is left out: AutoGPTQ stores zero codes minus one and packs -1 over the neighbours
            zeros[:, group] = torch.round(-low / scale.float()).clamp(1, 15).half()
        codes = torch.round(columns / scale[:, None].float() + zeros[:, group, None].float()).clamp(0, 15)
        weight[:, group_of == group] = ((codes - zeros[:, group, None]) * scale[:, None].float()).half()
        scales[:, group] = scale
    return scales, zeros, group_of.to(torch.int32)


linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
del linears["lm_head"]
rounded = {name: round_to_nearest(linear) for name, linear in linears.items()}
inputs = {name: linear.in_features for name, linear in linears.items()}
config = BaseQuantizeConfig(bits=4, group_size=GROUP_SIZE, desc_act=act_order, sym=not asymmetric)
chosen.out.mkdir(parents=True)
weights = chosen.out / "weights.safetensors"

if chosen.kind == "marlin":
    # The layer asks for the GPU that its kernel needs; packing happens on the CPU all the same.
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    for name, linear in linears.items():
        n, k = linear.weight.shape
        packed = qlinear_marlin.QuantLinear(4, GROUP_SIZE, k, n, bias=False)
        packed.pack(linear, rounded[name][0])
        model.set_submodule(name, packed)
    config.is_marlin_format = True
    # No CPU can run this layer: the reference is the rounded weight it was given.
    save_file({name: linear.weight.data for name, linear in linears.items()}, weights)
else:
    quantizers = {name: (None, *values) for name, values in rounded.items()}
    pack_model(model, quantizers, bits=4, group_size=GROUP_SIZE, desc_act=act_order)
    layers = {name: model.get_submodule(name) for name in linears}
    write_weights(layers, inputs, torch.float16, weights)

whole = LlamaGPTQForCausalLM(model, quantized=True, quantize_config=config)
whole.save_quantized(str(chosen.out / "checkpoint"))
