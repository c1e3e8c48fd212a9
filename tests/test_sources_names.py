"""What the tensors of a source are called: both ways of transformers, and those of no part of a model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diverse_models
import pytest
import tiny_models
import torch
import transformers
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checkpoint.writer import ShardWriter, TensorSpec
from marlin_convert.checks.numbers import _compare_weights
from marlin_convert.checks.subject import Original, Subject
from marlin_convert.errors import SourceError
from marlin_convert.formats import gptq, marlin
from marlin_convert.kernels.matmul import MarlinLinear
from marlin_convert.models.names import Names
from marlin_convert.models.tree import check_names
from marlin_convert.plan import make_plan
from marlin_convert.quantized import QuantizedLinear
from marlin_convert.ranks import ALONE
from marlin_convert.recipe import Recipe

Cli = Callable[..., Result]
Tensors = dict[str, Tensor]
SHARD = "model.safetensors"
FAST = ("--samples", 4, "--sequence-length", 64)

# Models that take images too

TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# class, its config, and the old name of its first projection
WRAPPERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral3": (
        "Mistral3",
        {
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 32},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
        "language_model.model.layers.0.self_attn.q_proj",
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": TEXT | {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
        "language_model.model.layers.0.self_attn.q_proj",
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": TEXT
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}},
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 128,
                "num_heads": 2,
                "patch_size": 14,
            },
        },
        "model.layers.0.self_attn.q_proj",
    ),
}
Q = "model.language_model.layers.0.self_attn.q_proj"


def class_of(kind: str) -> type[PreTrainedModel]:
    return getattr(transformers, f"{WRAPPERS[kind][0]}ForConditionalGeneration")


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request, tmp_path_factory) -> tuple[str, PreTrainedModel, Path]:
    """A random model, and its directory as transformers saves it: under the old names."""
    name, settings, old = WRAPPERS[request.param]
    torch.manual_seed(3)
    model = class_of(request.param)(getattr(transformers, f"{name}Config")(**settings)).eval()
    directory = tiny_models.save(model, tmp_path_factory.mktemp("wrapper") / request.param)
    assert f"{old}.weight" in load_file(directory / SHARD)
    return request.param, model, directory


def stored_as(directory: Path, tensors: Tensors, tmp_path: Path) -> Path:
    """A copy of a model with other tensors."""
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / SHARD, {"format": "pt"})
    return copy


def opened(directory: Path, model: PreTrainedModel) -> Weights:
    weights = Weights(Checkpoint.open(directory))
    Names(model).place(weights)
    return weights


def as_on_the_hub(tensors: Tensors) -> Tensors:
    """Gemma 3's vision tower has a level more there."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in tensors.items()}


@pytest.mark.parametrize("names", ["old", "new"])
def test_both_ways_to_name_tensors_are_read(names, wrapper, tmp_path):
    kind, model, directory = wrapper
    parameters = model.state_dict()
    tensors = load_file(directory / SHARD)
    if names == "old" and kind == "gemma3":
        tensors = as_on_the_hub(tensors)
    if names == "new":
        tensors = {name: one for name, one in parameters.items() if name not in model.all_tied_weights_keys}
    source = stored_as(directory, tensors, tmp_path)
    weights = opened(source, model)
    assert check_names(weights, Names(model)) == []
    assert weights.checkpoint.tensors.keys() == parameters.keys() - model.all_tied_weights_keys.keys()
    for name in weights.checkpoint.tensors:
        assert torch.equal(weights.read(name), parameters[name]), name
    assert {weights.on_disk(name) for name in weights.checkpoint.tensors} == tensors.keys()
    before = weights.checkpoint
    Names(model).place(weights)
    assert weights.checkpoint is before


def test_what_is_written_keeps_its_names_and_loads(wrapper, tmp_path):
    kind, model, directory = wrapper
    weights = opened(directory, model)
    specs = [TensorSpec(name, info.dtype, info.shape) for name, info in weights.checkpoint.tensors.items()]
    copy = stored_as(directory, {"nothing": torch.zeros(1)}, tmp_path)
    (copy / SHARD).unlink()
    with ShardWriter(copy, specs, 40_000, weights.on_disk) as writer:
        for name in writer.order:
            writer.write(name, weights.read(name))
        writer.close()
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"].keys()
        == load_file(directory / SHARD).keys()
        == Checkpoint.open(copy).tensors.keys()
    )
    loaded, said = class_of(kind).from_pretrained(copy, output_loading_info=True)
    assert not (said["missing_keys"] or said["unexpected_keys"])
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def packed(tensors: Tensors, linear: str, layout: ModuleType, group_size: int) -> QuantizedLinear:
    """Random codes in place of a weight."""
    k, n = tensors.pop(f"{linear}.weight").shape[::-1]
    codes = torch.randint(0, 16, (k, n), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    layer = QuantizedLinear(codes, torch.full((k // group_size, n), 0.01, dtype=torch.float16), group_size)
    tensors |= {f"{linear}.{suffix}": tensor for suffix, tensor in layout.pack(layer).items()}
    return layer


def test_transformers_finds_packed_linears_under_old_names(wrapper, tmp_path):
    """In layouts of ours, whose modules we put into the model: it would go on with random weights."""
    kind, _, directory = wrapper
    old, tensors = WRAPPERS[kind][2], load_file(directory / SHARD)
    packed(tensors, old, marlin, 128)
    source = stored_as(directory, tensors, tmp_path)
    say(source, quantization_config={"quant_method": "marlin", "bits": 4, "group_size": 128})
    loaded, said = class_of(kind).from_pretrained(source, output_loading_info=True)
    assert not (said["missing_keys"] or said["unexpected_keys"])
    module = loaded.get_submodule(Q)
    assert isinstance(module, MarlinLinear)
    assert torch.equal(module.B, tensors[f"{old}.B"]) and torch.equal(module.s, tensors[f"{old}.s"])
    # and refuses a class that has no such linear; those of Qwen2-VL were called as Llama's are
    said = "is packed in the files, and no linear of LlamaForCausalLM|its config.json means"
    with pytest.raises(SourceError, match=said):
        text = json.loads((directory / "config.json").read_text())["text_config"]
        settings = {key: text[key] for key in TEXT if key in text} | {"head_dim": 32}
        transformers.LlamaForCausalLM.from_pretrained(source, config=transformers.LlamaConfig(
            **settings, quantization_config={"quant_method": "marlin", "bits": 4, "group_size": 128},
        ))  # fmt: skip


def test_a_conversion_keeps_the_names_of_its_source_and_loads(wrapper, tmp_path, cli: Cli):
    kind, _, directory = wrapper
    text, output = tiny_models.text(tmp_path), tmp_path / "out"
    (tmp_path / "source").mkdir()
    source = Path(shutil.copytree(directory, tmp_path / "source", dirs_exist_ok=True))
    (source / "preprocessor_config.json").write_text("{}")
    words = ("--calibration", text, *FAST, "--dtype", "bfloat16")
    done = cli("quantize", source, "-o", output, "--format", "marlin", *words)
    assert done.exit_code == 0, done.output
    assert (output / "preprocessor_config.json").read_text() == "{}"
    old, written = WRAPPERS[kind][2], load_file(output / SHARD).keys()
    dense = {name for name in load_file(source / SHARD) if name.removesuffix("weight") + "B" not in written}
    assert f"{old}.B" in written and dense <= written
    checks = ("--checks", "files,layout,numbers,generate")
    found = cli("verify", output, "--source", source, "--text", text, *FAST, *checks)
    assert found.exit_code == 0 and "greedy tokens by transformers" in found.stdout, found.output


# a linear of the tower, by its names in the model and in the files
TOWERS = {
    "mistral3": (
        "model.vision_tower.transformer.layers.0.attention.q_proj",
        "vision_tower.transformer.layers.0.attention.q_proj",
    ),
    "gemma3": (
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "qwen2_vl": ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
}


@pytest.mark.parametrize(
    "format, key",
    [("compressed-tensors", "ignore"), ("gptq", "dynamic"), ("marlin", "modules_to_not_convert")],
)
def test_what_is_dense_is_named_as_in_the_files_too(format, key, wrapper, tmp_path):
    """vLLM makes its own names of these, and takes a tower that is not among them for packed."""
    kind, _, directory = wrapper
    tensors = load_file(directory / SHARD)
    source = stored_as(directory, as_on_the_hub(tensors) if kind == "gemma3" else tensors, tmp_path)
    plan = make_plan(Weights(Checkpoint.open(source)), Recipe(format=format))
    said = [re.sub(r"^-:\^|\\|\$$", "", name) for name in plan.config["quantization_config"][key]]
    assert set(TOWERS[kind]) <= set(said) and len(said) == len(set(said))


def test_a_source_is_compared_by_parameters_whatever_its_names(wrapper, tmp_path):
    _, model, directory = wrapper
    parameters = model.state_dict()
    tensors = {name: one for name, one in parameters.items() if name not in model.all_tied_weights_keys}
    tensors[f"{Q}.weight"] = 2 * tensors[f"{Q}.weight"]
    new = stored_as(directory, tensors, tmp_path)
    cpu = torch.device("cpu")
    subject = Subject(opened(new, model), model, None, cpu, False, ALONE)
    original = Original("old", Weights(Checkpoint.open(directory)), torch.zeros(1, 1), {})
    rows, unreadable = _compare_weights([], subject, original, 1e-3)
    assert not unreadable and {row["name"] for row in rows} >= tensors.keys()
    assert {row["name"]: row["error"] for row in rows if row["error"]} == {f"{Q}.weight": 1.0}


def test_a_packed_linear_under_an_old_name(wrapper, tmp_path):
    """What belongs to it goes by its weight, and the pattern of a config by either name of it."""
    kind, model, directory = wrapper
    old, tensors = WRAPPERS[kind][2], load_file(directory / SHARD)
    codes = packed(tensors, old, gptq, 32).codes
    source = stored_as(directory, tensors, tmp_path)
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    for name in (old, Q):
        say(source, quantization_config=said | {"dynamic": {rf"+:{name}$": {"group_size": 32}}})
        weights = opened(source, model)
        assert check_names(weights, Names(model)) == []
        assert weights.packed_linears() == [Q] and f"{Q}.weight" in weights
        assert torch.equal(weights.quantized(Q).codes, codes)
        assert weights.on_disk(f"{Q}.qweight") == f"{old}.qweight"
        # and in another layout
        assert weights.on_disk(f"{Q}.weight_packed") == f"{old}.weight_packed"


def test_one_parameter_under_both_names(wrapper, tmp_path):
    kind, model, directory = wrapper
    tensors, old = load_file(directory / SHARD), WRAPPERS[kind][2]
    tensors[f"{Q}.weight"] = tensors[f"{old}.weight"].clone()
    source = stored_as(directory, tensors, tmp_path)
    with pytest.raises(SourceError, match=rf"{old}.weight and .* are both|{Q}.weight and .* are both"):
        opened(source, model)


def test_a_stranger_in_a_wrapper_is_refused(wrapper, tmp_path):
    _, model, directory = wrapper
    tensors = load_file(directory / SHARD) | {"language_model.model.layers.0.mlp.extra.weight": torch.ones(2)}
    weights = opened(stored_as(directory, tensors, tmp_path), model)
    assert Names(model).beside(weights.checkpoint.tensors) == []


# Layers for multi-token prediction

BESIDE = {
    "mtp.layers.0.self_attn.q_proj.weight": (128, 128),
    "model.mtp_layers.0.norm.weight": (128,),
    "model.layers.2.eh_proj.weight": (128, 256),
    "model.layers.2.self_attn.q_proj.weight": (128, 128),
}


@pytest.fixture
def drafting(tmp_path) -> Path:
    """A model with weights that predict a second token: by name, and as a block past the last one."""
    directory = tiny_models.save(tiny_models.build("qwen3", torch.bfloat16), tmp_path / "drafting")
    draw = torch.Generator().manual_seed(5)
    more = {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in BESIDE.items()}
    save_file(load_file(directory / SHARD) | more, directory / SHARD, {"format": "pt"})
    say(directory, num_nextn_predict_layers=1)
    return directory


def say(directory: Path, **words: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


def test_they_are_copied_and_named(drafting, tmp_path, cli: Cli):
    text = tiny_models.text(tmp_path)
    words = ("--calibration", text, *FAST, "--group-size", 32, "--format", "gptq")
    plan = cli("quantize", drafting, "-o", tmp_path / "out", *words, "--dry-run")
    said = f"copied, no part of the model that is built: {min(BESIDE)} and 3 more"
    assert plan.exit_code == 0 and said in plan.stdout
    done = cli("quantize", drafting, "-o", tmp_path / "out", *words, "--report", tmp_path / "page.html")
    assert done.exit_code == 0 and said in done.stdout
    assert all(name in (tmp_path / "page.html").read_text() for name in BESIDE)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert sorted(manifest["beside"]) == sorted(BESIDE) and manifest["left_out"] == []
    stored, written = load_file(drafting / SHARD), load_file(tmp_path / "out" / SHARD)
    for name in BESIDE:
        assert torch.equal(written[name], stored[name]), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    check = ("verify", tmp_path / "out", "--source", drafting, "--text", text, *FAST)
    assert cli(*check).exit_code == 0
    # a copy that is none is found
    written[min(BESIDE)] = -written[min(BESIDE)]
    save_file(written, tmp_path / "out" / SHARD, {"format": "pt"})
    found = cli(*check, "--checks", "numbers")
    assert found.exit_code == 3 and f"{min(BESIDE)} is 2.00 from the source's" in found.stdout


def test_in_fp8_they_are_floats_too(drafting, tmp_path, cli: Cli):
    name = "mtp.layers.0.self_attn.q_proj.weight"
    tensors = load_file(drafting / SHARD)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    save_file(tensors, drafting / SHARD, {"format": "pt"})
    say(drafting, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    text = tiny_models.text(tmp_path)
    words = ("--calibration", text, *FAST, "--group-size", 32, "--format", "gptq")
    assert cli("quantize", drafting, "-o", tmp_path / "out", *words).exit_code == 0
    written = load_file(tmp_path / "out" / SHARD)
    assert torch.equal(written[name], (tensors[name].float() * 0.5).bfloat16())


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.layers.3.norm.weight", "architecture"), ("model.layers.0.mtpx.weight", "architecture")],
)
def test_strangers_are_still_refused(name, said, drafting, tmp_path, cli: Cli):
    tensors = load_file(drafting / SHARD) | {name: torch.ones(4).bfloat16()}
    save_file(tensors, drafting / SHARD, {"format": "pt"})
    done = cli("quantize", drafting, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 1 and name in done.stderr and said in done.stderr


def test_a_block_too_many_is_a_stranger(drafting, tmp_path, cli: Cli):
    """Where no config speaks of a layer for further tokens, its blocks may be counted wrong."""
    say(drafting, num_nextn_predict_layers=0)
    done = cli("quantize", drafting, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 1 and "model.layers.2." in done.stderr


def test_what_transformers_says_that_it_leaves_out():
    settings = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "n_routed_experts": 4,
        "vocab_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings))
    names = ["model.layers.61.eh_proj.weight", "model.layers.7.norm.weight", "model.norm.weight"]
    assert Names(model).beside(names) == names[:1]


def test_what_transformers_joins_is_joined_and_written_as_it_was(tmp_path, cli: Cli):
    """OLMo's hybrid has three convolutions in its files and one in memory."""
    model = diverse_models.build("olmo_hybrid", vocab_size=4096)
    source = tiny_models.save(model, tmp_path / "model")
    weights = opened(source, model)
    whole = "model.layers.0.linear_attn.conv1d.weight"
    assert torch.equal(weights.read(whole), model.state_dict()[whole])
    assert check_names(weights, Names(model)) == []
    output, small = tmp_path / "out", ("--samples", 2, "--sequence-length", 16)
    skip = [word for kind in ("q", "k", "v", "g") for word in ("--skip", f"*.linear_attn.{kind}_proj")]
    done = cli("quantize", source, "-o", output, "--format", "gptq", *skip, *small)
    assert done.exit_code == 0, done.stderr
    before, after = load_file(source / SHARD), load_file(output / SHARD)
    parts = [name for name in before if "conv1d" in name]
    assert len(parts) == 6 and all(torch.equal(before[name], after[name]) for name in parts)
    assert whole not in after
    assert cli("verify", output, "--source", source, "--samples", 2).exit_code == 0

    del before["model.layers.0.linear_attn.q_conv1d.weight"]
    save_file(before, source / SHARD, {"format": "pt"})
    done = cli("quantize", source, "-o", tmp_path / "no", "--format", "gptq", *small)
    assert done.exit_code == 1 and "k_conv1d.weight" in done.stderr


def test_a_counter_is_read_as_it_is(tmp_path):
    directory = tiny_models.save(tiny_models.build("llama"), tmp_path / "model")
    tensors = load_file(directory / SHARD) | {"model.norm.num_batches_tracked": torch.tensor(7)}
    save_file(tensors, directory / SHARD, {"format": "pt"})
    weights = Weights(Checkpoint.open(directory))
    assert weights.read("model.norm.num_batches_tracked").item() == 7
    assert weights.dtype("model.norm.num_batches_tracked") == torch.int64
