"""Sources stored in fp8: weights are the floats that they mean, and what is no scale is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diverse_models
import pytest
import tiny_models
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from marlin_convert.checkpoint import fp8
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import SourceError
from marlin_convert.models.tree import module_tree

Cli = Callable[..., Result]
Tensors = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn
SHARD = "model.safetensors"
FIRST = "model.layers.0.self_attn.q_proj.weight"
SCALES = FIRST + "_scale_inv"
FAST = ("--samples", 4, "--sequence-length", 64)


def fine_grained(block: list[int] | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block} | more


def float_quantized(strategy: str, block: list[int] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": block}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


# config, suffix of the scales, rows and columns that share one, their type, their shape if it is no grid
STORED: dict[str, tuple[dict[str, Any], str, tuple[int, int], torch.dtype, tuple[int, ...] | None]] = {
    "blocks": (fine_grained([128, 128]), "_scale_inv", (128, 128), torch.float32, None),
    "odd blocks": (fine_grained([48, 80]), "_scale_inv", (48, 80), torch.bfloat16, None),
    "rows": (fine_grained([1, 32]), "_scale_inv", (1, 32), torch.float32, None),
    "whole": (fine_grained(None), "_scale_inv", (9999, 9999), torch.bfloat16, ()),
    "whole in vllm": (
        {"quant_method": "fp8", "activation_scheme": "static"}, "_scale", (9999, 9999), torch.float32, (1,),
    ),
    "said by default": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        "_scale_inv", (128, 128), torch.float32, None,
    ),
    "tensor": (float_quantized("tensor"), "_scale", (9999, 9999), torch.float32, (1,)),
    "channel": (float_quantized("channel"), "_scale", (1, 9999), torch.bfloat16, None),
    "block": (float_quantized("block", [128, 128]), "_scale", (128, 128), torch.float32, None),
}  # fmt: skip


def divided(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in fp8, its scales, and the floats in bfloat16 that both mean: a block after the other."""
    n, k = weight.shape
    rows, columns = min(block[0], n), min(block[1], k)
    grid = torch.empty(-(-n // rows), -(-k // columns), dtype=dtype)
    stored, meant = torch.empty(n, k, dtype=E4M3), torch.empty(n, k, dtype=torch.bfloat16)
    for i in range(len(grid)):
        for j in range(grid.shape[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            grid[i, j] = weight[here].float().abs().max() / 448
            stored[here] = (weight[here].float() / grid[i, j].float()).clamp(-448, 448).to(E4M3)
            meant[here] = (stored[here].double() * grid[i, j].double()).float().bfloat16()
    return stored, grid, meant


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which no side is a multiple of the blocks."""
    model = tiny_models.build("qwen3", torch.bfloat16, hidden_size=160, intermediate_size=288)
    return tiny_models.save(model, tmp_path_factory.mktemp("fp8") / "plain")


def store(plain: Path, directory: Path, kind: str, **words: object) -> tuple[Path, Tensors]:
    """A copy with the linears of its blocks in fp8, and what all of its tensors mean."""
    config, suffix, block, dtype, shape = STORED[kind]
    shutil.copytree(plain, directory)
    tensors, meant = {}, {}
    for name, tensor in load_file(plain / SHARD).items():
        tensors[name] = meant[name] = tensor
        if name.endswith("_proj.weight"):
            tensors[name], grid, meant[name] = divided(tensor, block, dtype)
            tensors[name + suffix] = grid if shape is None else grid.reshape(shape)
            if config.get("activation_scheme") == "static":
                tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    save_file(tensors, directory / SHARD, {"format": "pt"})
    said = json.loads((plain / "config.json").read_text()) | {"quantization_config": config} | words
    (directory / "config.json").write_text(json.dumps(said))
    return directory, meant


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("values", [fp8.SLICE, 500])
def test_weights_are_what_their_scales_make_of_them(kind, values, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, "SLICE", values)
    directory, meant = store(plain, tmp_path / "stored", kind)
    weights = Weights(Checkpoint.open(directory))
    assert weights.checkpoint.tensors.keys() == meant.keys()
    for name, expected in meant.items():
        found = weights.read(name)
        assert found.dtype == weights.dtype(name) == torch.bfloat16
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("block", [[128, 128], [32, 64], None])
def test_transformers_reads_the_same(block, tmp_path, monkeypatch):
    """Which knows no blocks that end before they are full."""
    plain = tiny_models.save(tiny_models.build("llama", torch.bfloat16, hidden_size=256), tmp_path / "plain")
    shares = tuple(block) if block else (9999, 9999)
    now = (fine_grained(block), "_scale_inv", shares, torch.float32, None if block else ())
    monkeypatch.setitem(STORED, "now", now)
    directory, _ = store(plain, tmp_path / "stored", "now")
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=FineGrainedFP8Config(weight_block_size=block, dequantize=True)
    )
    weights = Weights(Checkpoint.open(directory))
    for name, expected in theirs.state_dict().items():
        assert torch.equal(weights.read(name), expected), name


@pytest.mark.parametrize("kind", ["odd blocks", "channel", "whole in vllm"])
def test_a_conversion_is_that_of_the_floats(kind, plain, text, tmp_path, cli: Cli):
    """The same tensors as from a source that has the floats, in bfloat16; a skipped linear is among them."""
    directory, meant = store(plain, tmp_path / "stored", kind)
    floats = Path(shutil.copytree(plain, tmp_path / "floats"))
    save_file(meant, floats / SHARD, {"format": "pt"})
    words = ("--calibration", text, "--skip", "*.1.mlp.down_proj", "--group-size", 32, *FAST)
    for source in (directory, floats):
        done = cli("quantize", source, "-o", tmp_path / f"{source.name}-4", "--format", "gptq", *words)
        assert done.exit_code == 0, done.output
        assert ("note: stored in fp8 with" in done.stdout) == (source == directory)
    ours, theirs = tmp_path / "stored-4", tmp_path / "floats-4"
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
    written, expected = load_file(ours / SHARD), load_file(theirs / SHARD)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert written["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert not [name for name in written if name.endswith((*fp8.OF_WEIGHTS, *fp8.OF_INPUTS))]
    said = {"odd blocks": "block scales", "channel": "a scale an output", "whole in vllm": "a scale a tensor"}
    source = json.loads((ours / MANIFEST).read_text())["source"]
    assert source["stored_in"] == f"fp8 with {said[kind]}" and source["quantization"] is None
    assert "stored_in" not in json.loads((theirs / MANIFEST).read_text())["source"]
    checked = cli("verify", ours, "--source", directory, "--text", text, *FAST)
    assert checked.exit_code == 0, checked.output


# Of all experts one tensor: as (E, n, k); as (E, k, n); so, and with gate and up in turn.
@pytest.fixture(scope="module", params=["qwen3_moe", "llama4_text", "gpt_oss"])
def mixture(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = diverse_models.build(request.param, vocab_size=4096, hidden_size=192).bfloat16()
    directory = tiny_models.save(model, tmp_path_factory.mktemp("mixture") / request.param)
    model.save_pretrained(directory, save_original_format=False)
    return directory


def stack(mixture: Path, directory: Path, kind: str) -> tuple[Path, Path]:
    """A copy with its experts in fp8, as they are stacked, and one with the floats that they mean."""
    config, suffix, block, dtype, shape = STORED[kind]
    tensors, meant = {}, {}
    for name, tensor in load_file(mixture / SHARD).items():
        tensors[name] = meant[name] = tensor
        if not (".experts." in name and name.endswith("_proj") and tensor.dim() == 3):
            continue
        turned_over = mixture.name != "qwen3_moe"
        sizes = block[::-1] if turned_over and kind == "channel" else block
        stored, grids, floats = zip(*(divided(one, sizes, dtype) for one in tensor), strict=True)
        tensors[name], meant[name], grid = torch.stack(stored), torch.stack(floats), torch.stack(grids)
        tensors[name + suffix] = grid if shape is None else grid.reshape(-1)
        if config.get("activation_scheme") == "static":
            tensors[name + "_input_scale"] = torch.ones(len(tensor))
    assert len(meant) < len(tensors)
    for path, found in ((directory / "stored", tensors), (directory / "floats", meant)):
        shutil.copytree(mixture, path)
        save_file(found, path / SHARD, {"format": "pt"})
    said = json.loads((mixture / "config.json").read_text()) | {"quantization_config": config}
    (directory / "stored" / "config.json").write_text(json.dumps(said))
    return directory / "stored", directory / "floats"


@pytest.mark.parametrize("kind", ["odd blocks", "channel", "whole in vllm"])
def test_experts_that_are_stacked_are_what_their_scales_make_of_them(kind, mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, "SLICE", 5000)
    found, expected = (Weights(Checkpoint.open(path)) for path in stack(mixture, tmp_path, kind))
    for weights in (found, expected):
        module_tree(weights)
    assert found.checkpoint.tensors.keys() == expected.checkpoint.tensors.keys()
    experts = [name for name in found.scaled if ".experts.1." in name]
    assert len(experts) >= 6 and found.stored_in and expected.stored_in is None
    for name in expected.checkpoint.tensors:
        assert found.shape(name) == expected.shape(name), name
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("mixture", ["llama4_text"], indirect=True)
def test_a_mixture_with_stacked_experts_in_fp8_is_converted(mixture, text, tmp_path, cli: Cli):
    for source in stack(mixture, tmp_path, "blocks"):
        words = ("--calibration", text, "--format", "compressed-tensors", "--group-size", 32, *FAST)
        done = cli("quantize", source, "-o", tmp_path / f"{source.name}-4", *words)
        assert done.exit_code == 0, done.output
    ours, theirs = (load_file(tmp_path / f"{name}-4" / SHARD) for name in ("stored", "floats"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_experts_of_llama_4_one_by_one_in_fp8(text, tmp_path, cli: Cli):
    """As its FP8 release is: a tensor and a scale an output for every matrix of every expert."""
    model = diverse_models.build("llama4_text", vocab_size=4096).bfloat16()
    plain = tiny_models.save(model, tmp_path / "plain")
    stored, meant = {}, {}
    for name, tensor in load_file(plain / SHARD).items():
        stored[name] = meant[name] = tensor
        if ".experts." not in name:
            continue
        del stored[name], meant[name]
        around, _, kind = name.rpartition(".")
        halves = zip(("gate_proj", "up_proj"), tensor.chunk(2, -1), strict=True)
        for role, all_experts in halves if kind == "gate_up_proj" else [(kind, tensor)]:
            for number, one in enumerate(all_experts):
                called = f"{around}.{number}.{role}.weight"
                codes, scales, meant[called] = divided(one.T.contiguous(), (1, 9999), torch.bfloat16)
                stored |= {called: codes, called + "_scale": scales}
    written = []
    for found, config in ((stored, {"quantization_config": float_quantized("channel")}), (meant, {})):
        source = Path(shutil.copytree(plain, tmp_path / f"source-{len(config)}"))
        save_file(found, source / SHARD, {"format": "pt"})
        said = json.loads((plain / "config.json").read_text()) | config
        (source / "config.json").write_text(json.dumps(said))
        output = tmp_path / f"out-{len(config)}"
        words = ("--calibration", text, "--format", "compressed-tensors", "--only", "experts", *FAST)
        done = cli("quantize", source, "-o", output, *words)
        assert done.exit_code == 0, done.output
        written.append(load_file(output / SHARD))
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_a_stack_in_fp8_that_is_no_experts_is_refused(mixture, tmp_path, cli: Cli):
    directory, _ = stack(mixture, tmp_path, "blocks")
    tensors = load_file(directory / SHARD)
    name = next(name for name in tensors if name.endswith("_proj") and tensors[name].dtype == E4M3)
    tensors["model.extra"] = tensors[name].clone()
    tensors["model.extra_scale_inv"] = tensors[name + "_scale_inv"].clone()
    save_file(tensors, directory / SHARD)
    done = cli("quantize", directory, "-o", tmp_path / "out", "--dry-run")
    assert (
        done.exit_code == 1 and "model.extra of shape" in done.stderr and "no stack of experts" in done.stderr
    )
    del tensors["model.extra"], tensors["model.extra_scale_inv"]
    for spoiled, said in (
        (lambda found: found[1:].clone(), "has shape"),
        (lambda found: found.flatten(1).clone(), "has shape"),
        (lambda found: -found, "negative"),
    ):
        save_file(tensors | {name + "_scale_inv": spoiled(tensors[name + "_scale_inv"])}, directory / SHARD)
        done = cli("quantize", directory, "-o", tmp_path / "out", "--dry-run")
        assert done.exit_code == 1 and said in done.stderr and name in done.stderr, done.stderr


def test_an_embedding_in_fp8_does_not_say_its_own_type(plain, tmp_path):
    directory, _ = store(plain, tmp_path / "stored", "tensor", dtype=None)
    tensors = load_file(directory / SHARD)
    name = "model.embed_tokens.weight"
    tensors[name], tensors[name + "_scale"], meant = divided(tensors[name], (9999, 9999), torch.float32)
    tensors[name + "_scale"] = tensors[name + "_scale"].reshape(1)
    save_file(tensors, directory / SHARD)
    assert torch.equal(Weights(Checkpoint.open(directory)).read(name), meant)


def scales(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({SCALES: change(tensors[SCALES])})


def spoiled(value: float, *where: int) -> Callable[[Tensors], object]:
    return scales(lambda found: found.index_put(tuple(map(torch.tensor, where)), torch.tensor(value)))


DAMAGE: list[tuple[Callable[[Tensors], object], list[str]]] = [
    (lambda tensors: tensors.pop(SCALES), [FIRST, "there is no", SCALES]),
    (scales(lambda found: found[:1].clone()), [SCALES, "(1, 2)", "(2, 2)"]),
    (scales(lambda found: found.sum()), [SCALES, "shape ()", "(2, 2)"]),
    (spoiled(torch.nan, 0), [SCALES, "2 of 4", "NaN"]),
    (spoiled(torch.inf, 0, 0), [SCALES, "1 of 4"]),
    (spoiled(0.0, 1, 0), [SCALES, "1 of 4", "zero"]),
    (scales(lambda found: -found), [SCALES, "4 of 4", "negative"]),
    (scales(lambda found: found.int()), [FIRST, "scales in I32"]),
    (lambda tensors: tensors.update({FIRST + "_scale": tensors[SCALES].clone()}), [FIRST, "both", SCALES]),
    (lambda tensors: tensors.update({FIRST: tensors[FIRST].float().bfloat16()}), [SCALES, "architecture"]),
    (lambda tensors: tensors.update({FIRST: tensors[FIRST][0].clone()}), [FIRST, "matrices"]),
    (lambda tensors: tensors.update({"model.extra.input_scale": torch.ones(1)}), ["model.extra.input_scale"]),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_what_is_no_scale_is_refused_before_any_work(damage, said, plain, tmp_path, cli: Cli):
    directory, _ = store(plain, tmp_path / "stored", "blocks")
    tensors = load_file(directory / SHARD)
    damage(tensors)
    save_file(tensors, directory / SHARD)
    done = cli("quantize", directory, "-o", tmp_path / "out", "--group-size", 32, "--dry-run")
    assert done.exit_code == 1, done.output
    assert all(word in done.stderr for word in said), done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (fine_grained([128]), "weight_block_size is [128]"),
        (fine_grained([0, 128]), "weight_block_size is [0, 128]"),
        (float_quantized("group"), "strategy 'group'"),
        (float_quantized("block"), "block_structure is None"),
        (float_quantized("tensor") | {"transform_config": {"R1": {}}}, "transform_config"),
        (float_quantized("tensor") | {"sparsity_config": {"format": "sparse-24"}}, "a second time"),
    ],
)
def test_a_config_that_makes_no_sense(config, said, plain, tmp_path, cli: Cli):
    directory, _ = store(plain, tmp_path / "stored", "blocks", quantization_config=config)
    done = cli("quantize", directory, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 1 and said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("value", "scale", "dtype", "said"),
    [
        (torch.nan, 1.0, "bfloat16", "holds NaN"),
        (448.0, 1e38, "bfloat16", "holds NaN or Inf"),
        (448.0, 1e6, "float16", "does not fit float16: its largest value is 448000000"),
    ],
)
def test_values_that_are_not_finite(value, scale, dtype, said, plain, tmp_path):
    directory, _ = store(plain, tmp_path / "stored", "blocks", dtype=dtype)
    tensors = load_file(directory / SHARD)
    tensors[FIRST] = tensors[FIRST].float().fill_(1e-2).to(E4M3)
    tensors[FIRST].view(torch.uint8)[3, 5] = torch.tensor(value).to(E4M3).view(torch.uint8)
    tensors[SCALES].fill_(scale)
    save_file(tensors, directory / SHARD)
    with pytest.raises(SourceError, match=f"{FIRST} {said}"):
        Weights(Checkpoint.open(directory)).read(FIRST)
