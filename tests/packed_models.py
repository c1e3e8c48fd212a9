"""Tiny models whose linears are packed: random codes in every layout that is read."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.formats import compressed_tensors, gptq, marlin, marlin_24
from marlin_convert.quantized import QuantizedLinear, contiguous_groups

GROUP_SIZE = 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
}
LINEARS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (128, 64),
    "self_attn.v_proj": (128, 64),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (128, 256),
    "mlp.up_proj": (128, 256),
    "mlp.down_proj": (256, 128),
}
FIRST = "model.layers.0.self_attn.q_proj"


def random_linear(
    k,
    n,
    seed,
    bits=4,
    group_size=GROUP_SIZE,
    asymmetric=False,
    act_order=False,
    least_zero=1,
    sparse=False,
):
    """Random codes and positive scales that float16 and bfloat16 both hold."""
    g = torch.Generator().manual_seed(seed)
    rows = k if group_size == -1 else group_size
    shape = (-(-k // rows), n)
    zeros = order = None
    if asymmetric:
        zeros = torch.randint(least_zero, 1 << bits, shape, generator=g, dtype=torch.uint8)
        zeros[0, :2] = torch.tensor([least_zero, (1 << bits) - 1], dtype=torch.uint8)
    if act_order:
        order = contiguous_groups(k, rows)[torch.randperm(k, generator=g)]
    codes = torch.randint(0, 1 << bits, (k, n), generator=g, dtype=torch.uint8)
    if sparse:
        codes[~two_of_four(k, n, g)] = 8
    scales = torch.randint(1, 128, shape, generator=g).half() / 16384
    return QuantizedLinear(codes, scales, rows, bits, zeros, order)


def two_of_four(k, n, generator):
    """Two random rows of every four of a column: (k, n) bool."""
    order = torch.rand(k // 4, 4, n, generator=generator).argsort(1)
    return (order < 2).view(k, n)


def random_linears(blocks=2, **kind):
    shapes = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in LINEARS.items()}
    return {name: random_linear(k, n, seed, **kind) for seed, (name, (k, n)) in enumerate(shapes.items())}


def save(directory, linears, pack, quantization_config, blocks=2, vocabulary=4096):
    """A model of these linears as its maker leaves it: one file, config.json, a tokenizer."""
    g = torch.Generator().manual_seed(1)
    directory.mkdir()
    tensors = {}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(vocabulary, 128, generator=g).half() * 0.02
    norms = [
        f"model.layers.{i}.{name}_layernorm" for i in range(blocks) for name in ("input", "post_attention")
    ]
    for name in [*norms, "model.norm"]:
        tensors[f"{name}.weight"] = torch.ones(128).half()
    for name, layer in linears.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in pack(layer).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = CONFIG | {
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
        "quantization_config": quantization_config,
    }
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parents[1] / "examples" / "tinypy-4m" / name, directory)
    return directory


def prune(source, directory):
    """A copy of a GPTQ model of ours as a peer leaves one, the smaller two codes of every quad zero."""
    directory.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("marlin_convert"):
            shutil.copy(path, directory)
    weights = Weights(Checkpoint.open(source))
    tensors = load_file(source / "model.safetensors")
    for linear in weights.packed_linears():
        layer = weights.quantized(linear)
        quads = layer.codes.view(-1, 4, layer.n)
        smaller = (quads.int() - 8).abs().argsort(dim=1, stable=True)[:, :2]
        quads.scatter_(1, smaller, 8)
        tensors[f"{linear}.qweight"] = gptq.pack(layer)["qweight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def dequantize(source, directory, dtype):
    """The same model with its codes written out as plain weights."""
    checkpoint = Checkpoint.open(source)
    weights = Weights(checkpoint)
    linears = {f"{linear}.weight" for linear in weights.packed_linears()}
    names = checkpoint.tensors.keys() - weights.packed_names() | linears
    directory.mkdir()
    tensors = {name: weights.read(name).to(dtype) for name in names}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config))
    for path in (*source.glob("tokenizer*.json"), *source.glob("generation_config.json")):
        shutil.copy(path, directory)
    return directory


# The sources: what the linears are like, how they are stored, and what the config of their maker says.


def gptq_config(**other):
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
    } | other


def compressed_config(**weights):
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    } | weights
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "zero_point": True,
    "version": "gemm",
}


def pack_awq(layer):
    """AutoAWQ's layout, nibble by nibble."""

    def words(codes):
        fields = codes.long().reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        packed = sum(fields[:, :, f] << (4 * f) for f in range(8))
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    zeros = torch.full(layer.scales.shape, 8) if layer.zeros is None else layer.zeros
    return {"qweight": words(layer.codes), "qzeros": words(zeros), "scales": layer.scales}


def without(suffix, pack):
    return lambda layer: {name: tensor for name, tensor in pack(layer).items() if name != suffix}


def pack_awq_marlin(layer):
    packed = marlin.pack(layer)
    return {"qweight": packed["B"], "scales": packed["s"]}


def pack_compressed_24(layer):
    """marlin-24 as compressed-tensors calls it."""
    return dict(zip(compressed_tensors.MARLIN_24_NAMES, marlin_24.pack(layer).values(), strict=True))


def pack_old_compressed(layer):
    """As before compressed-tensors 0.19: bfloat16 scales of a bfloat16 model, a g_idx that says nothing."""
    packed = compressed_tensors.pack(layer)
    packed["weight_scale"] = packed["weight_scale"].bfloat16()
    return packed | {"weight_g_idx": torch.full((layer.k,), -1, dtype=torch.int32)}


gptq_v2 = partial(gptq.pack, version=2)
SPARSE, SPARSE_CHANNEL = ({"group_size": size, "sparse": True} for size in (128, -1))
OURS_24 = {"quant_method": "marlin_24", "bits": 4, "group_size": 128}
ASYMMETRIC, ACT_ORDER = {"asymmetric": True}, {"act_order": True}
SOURCES = {
    "gptq": ({}, gptq.pack, gptq_config(checkpoint_format="gptq")),
    "gptq-v2": ({}, gptq_v2, gptq_config(checkpoint_format="gptq_v2", format="gptq_v2")),
    "gptq-channel": ({"group_size": -1}, gptq.pack, gptq_config(group_size=-1)),
    "gptq-no-g_idx": ({}, without("g_idx", gptq.pack), gptq_config()),
    "gptq-static-groups": ({}, gptq.pack, gptq_config(desc_act=True, static_groups=True)),
    "gptq-labelled-asymmetric": ({}, gptq.pack, gptq_config(sym=False)),
    "gptq-8bit": ({"bits": 8}, gptq.pack, gptq_config(bits=8)),
    "gptq-asymmetric": (ASYMMETRIC, gptq.pack, gptq_config(sym=False)),
    "gptq-asymmetric-labelled-symmetric": (ASYMMETRIC, gptq.pack, gptq_config()),
    "gptq-v2-asymmetric": (ASYMMETRIC, gptq_v2, gptq_config(sym=False, checkpoint_format="gptq_v2")),
    "gptq-v2-zero-0": (
        {"asymmetric": True, "least_zero": 0},
        gptq_v2,
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq-act-order": (ACT_ORDER, gptq.pack, gptq_config(desc_act=True)),
    "gptq-act-order-unlabelled": (ACT_ORDER, gptq.pack, gptq_config()),
    "gptq-v2-act-order": (
        ACT_ORDER | ASYMMETRIC,
        gptq_v2,
        gptq_config(desc_act=True, sym=False, checkpoint_format="gptq_v2"),
    ),
    "marlin": ({}, marlin.pack, gptq_config(checkpoint_format="marlin")),
    "marlin-0.7": ({}, marlin.pack, gptq_config(is_marlin_format=True)),
    "awq-marlin": ({}, pack_awq_marlin, AWQ_CONFIG | {"version": "marlin", "zero_point": False}),
    "awq": ({}, pack_awq, AWQ_CONFIG),
    "awq-asymmetric": (ASYMMETRIC, pack_awq, AWQ_CONFIG),
    "marlin-24": (SPARSE, marlin_24.pack, gptq_config(checkpoint_format="marlin_24", group_size=128)),
    "marlin-24-ours": (SPARSE, marlin_24.pack, OURS_24),
    "marlin-24-channel": (SPARSE_CHANNEL, marlin_24.pack, OURS_24 | {"group_size": -1}),
    "marlin-24-compressed": (
        SPARSE_CHANNEL,
        pack_compressed_24,
        compressed_config(strategy="channel", group_size=None) | {"format": "marlin-24"},
    ),
    "gptq-sparse": (SPARSE, gptq.pack, gptq_config(group_size=128)),
    "marlin-sparse": (SPARSE, marlin.pack, gptq_config(checkpoint_format="marlin", group_size=128)),
    "compressed-tensors-sparse": (SPARSE, compressed_tensors.pack, compressed_config(group_size=128)),
    "compressed-tensors": ({}, compressed_tensors.pack, compressed_config()),
    "compressed-tensors-old": ({}, pack_old_compressed, compressed_config()),
    "compressed-tensors-channel": (
        {"group_size": -1},
        compressed_tensors.pack,
        compressed_config(strategy="channel", group_size=None),
    ),
    "compressed-tensors-8bit": ({"bits": 8}, compressed_tensors.pack, compressed_config(num_bits=8)),
    "compressed-tensors-asymmetric": (
        ASYMMETRIC,
        compressed_tensors.pack,
        compressed_config(symmetric=False),
    ),
}


def make(name, directory, blocks=2, vocabulary=4096):
    """One of the sources, written into the directory; its linears."""
    kind, pack, config = SOURCES[name]
    linears = random_linears(blocks, **kind)
    save(directory, linears, pack, config, blocks, vocabulary)
    return linears
