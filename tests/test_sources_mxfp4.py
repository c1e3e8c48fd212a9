"""Experts in MXFP4, as gpt-oss has them on the Hub, are read as transformers dequantizes them, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path

import diverse_models
import pytest
import tiny_models
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.models.tree import module_tree

SHARD = "model.safetensors"
STACKS = {"gate_up_proj": (256, 128), "down_proj": (128, 128)}
NAME = "model.layers.1.mlp.experts.gate_up_proj"
Cli = Callable[..., Result]


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """A tiny one, its experts random values and scales."""
    model = diverse_models.build("gpt_oss", vocab_size=4096, intermediate_size=128)
    directory = tiny_models.save(model, tmp_path / "gpt-oss")
    tensors = load_file(directory / SHARD)
    generator = torch.Generator().manual_seed(3)
    for layer in range(4):
        for kind, (n, k) in STACKS.items():
            name = f"model.layers.{layer}.mlp.experts.{kind}"
            del tensors[name]
            tensors[f"{name}_blocks"] = torch.randint(
                0, 256, (4, n, k // 32, 16), generator=generator, dtype=torch.uint8
            )
            scales = torch.randint(118, 124, (4, n, k // 32), generator=generator)
            tensors[f"{name}_scales"] = scales.to(torch.uint8)
    save_file(tensors, directory / SHARD, {"format": "pt"})
    say = json.loads((directory / "config.json").read_text())
    say["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(say))
    return directory


def test_every_value_is_that_of_transformers(gpt_oss: Path) -> None:
    weights = Weights(Checkpoint.open(gpt_oss))
    module_tree(weights)
    tensors = load_file(gpt_oss / SHARD)
    for layer in range(4):
        path = f"model.layers.{layer}.mlp.experts"
        both, down = (
            convert_moe_packed_tensors(tensors[f"{path}.{kind}_blocks"], tensors[f"{path}.{kind}_scales"])
            for kind in STACKS
        )  # (E, k, n)
        for i in range(4):
            expected = {"gate": both[i].T[0::2], "up": both[i].T[1::2], "down": down[i].T}
            for kind, weight in expected.items():
                read = weights.read(f"{path}.{i}.{kind}_proj.weight")
                assert read.dtype == weight.dtype == torch.bfloat16 and torch.equal(read, weight)
    assert weights.stored_in == "mxfp4"


def test_it_is_converted_and_verified(gpt_oss: Path, cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "out"
    small = ("--samples", 4, "--sequence-length", 64)
    done = cli("quantize", gpt_oss, "-o", output, "--format", "gptq", *small)
    assert done.exit_code == 0, done.stderr
    assert "stored in mxfp4: read as floats" in done.stdout
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert not any("_blocks" in name or "_scales" in name for name in load_file(output / SHARD))
    done = cli("verify", output, "--source", gpt_oss, "--samples", 2, "--sequence-length", 64)
    assert done.exit_code == 0, done.stdout


def cut(tensors: dict[str, Tensor]) -> None:
    """Half of the outputs."""
    for suffix in ("_blocks", "_scales"):
        tensors[f"{NAME}{suffix}"] = tensors[f"{NAME}{suffix}"][:, :128].clone()


def change_to(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{NAME}{suffix}": change(tensors[f"{NAME}{suffix}"]).clone()})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors: tensors.pop(f"{NAME}_scales"), f"{NAME}_blocks has no {NAME}_scales beside it"),
        (change_to("_scales", lambda x: x[:, :3]), "meant are U8 (experts, n, k / 32"),
        (change_to("_blocks", Tensor.float), "F32 (4, 256, 4, 16)"),
        (change_to("_scales", lambda x: torch.full_like(x, 255)), f"{NAME}_scales holds NaN"),
        (cut, "has shape (4, 128, 128), its config.json means (4, 256, 128)"),
    ],
)
def test_what_makes_no_sense_is_named(
    change: Callable[[dict[str, Tensor]], object], said: str, gpt_oss: Path, cli: Cli, tmp_path: Path
) -> None:
    tensors = load_file(gpt_oss / SHARD)
    change(tensors)
    save_file(tensors, gpt_oss / SHARD, {"format": "pt"})
    done = cli("quantize", gpt_oss, "-o", tmp_path / "out", "--format", "gptq", "--samples", 2)
    assert done.exit_code == 1 and said in done.stderr, done.stderr
