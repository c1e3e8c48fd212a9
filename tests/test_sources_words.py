"""What a quantized source says of itself: its tensors decide, and --requantize gets past the rest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from packed_models import (
    AWQ_CONFIG,
    FIRST,
    GROUP_SIZE,
    LINEARS,
    compressed_config,
    dequantize,
    gptq_config,
    pack_awq,
    random_linear,
    random_linears,
    save,
    without,
)
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.formats import compressed_tensors, gptq, marlin
from marlin_convert.quantized import same_codes

SOLVE = ("--samples", 4, "--sequence-length", 64, "--device", "cpu")
AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "sym": True,
}
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
DOWN_HAS_8 = {f"model.layers.{i}.mlp.down_proj": {"bits": 8} for i in (0, 1)}
PLAIN = compressed_config()
OF_MARLIN = {"quant_method": "marlin", "group_size": GROUP_SIZE}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_models.text(tmp_path)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def change(directory: Path, **keys: object) -> None:
    """Set keys of the config.json; what is None is taken out."""
    config = config_of(directory) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def edit(directory: Path, tensors: Callable[[dict], dict]) -> None:
    path = directory / "model.safetensors"
    save_file(tensors(load_file(path)), path, {"format": "pt"})


def codes(directory: Path) -> dict:
    weights = Weights(Checkpoint.open(directory))
    return {name: weights.quantized(name) for name in weights.packed_linears()}


@pytest.mark.parametrize(
    "pack, words",
    [
        (without("g_idx", gptq.pack), AUTO_ROUND),
        (gptq.pack, AUTO_ROUND | {"packing_format": "auto_round:gptq_marlin"}),
        (pack_awq, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}),
        (gptq.pack, gptq_config(quant_method="gptq_marlin", bits="4")),
        (gptq.pack, gptq_config(dynamic={"+:.*down_proj": {"mse": 2.0, "desc_act": False}})),
        (compressed_tensors.pack, PLAIN | {"quantization_status": "frozen"}),
        (compressed_tensors.pack, PLAIN | {"kv_cache_scheme": KV_CACHE}),
        (marlin.pack, OF_MARLIN),
        (gptq.pack, gptq_config(bits=4.0, group_size=float(GROUP_SIZE), sym=1, desc_act=0)),
        (gptq.pack, gptq_config(quant_method="GPTQ", checkpoint_format="GPTQ", format="gptq")),
        (gptq.pack, {"bits": 4, "group_size": GROUP_SIZE, "sym": True}),
        (gptq.pack, AUTO_ROUND | {"data_type": None, "extra_config": {"lm_head": None}}),
    ],
    ids=[
        *("auto-round", "gptq_marlin", "awq", "text", "dynamic", "frozen", "kv cache", "group size alone"),
        *("numbers", "capitals", "no method", "nulls"),
    ],
)
def test_words_that_are_no_obstacle(pack, words, cli, tmp_path) -> None:
    linears = random_linears()
    source = save(tmp_path / "source", linears, pack, words)
    result = cli("quantize", source, "-o", tmp_path / "out", "--format", "compressed-tensors")
    assert result.exit_code == 0, result.stderr
    found = codes(tmp_path / "out")
    assert found.keys() == linears.keys()
    assert all(same_codes(found[name].codes, layer.codes) for name, layer in linears.items())
    assert ("kv_cache_scheme is left out" in result.stdout + result.stderr) == ("kv_cache_scheme" in words)
    assert not (config_of(tmp_path / "out")["quantization_config"].get("kv_cache_scheme"))


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_the_other_keys_that_these_words_stand_under(key, cli, tmp_path) -> None:
    linears = random_linears()
    source = save(tmp_path / "source", linears, compressed_tensors.pack, PLAIN)
    change(source, quantization_config=None, **{key: PLAIN})
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert codes(tmp_path / "out").keys() == linears.keys()
    assert key not in config_of(tmp_path / "out")


def test_scales_of_a_quantized_cache_are_left_out_and_named(cli, tmp_path) -> None:
    source = save(tmp_path / "source", random_linears(), compressed_tensors.pack, PLAIN)
    scales = {f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in range(2) for x in "kv"}
    edit(source, lambda tensors: tensors | scales)
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "model.layers.0.self_attn.k_scale" in result.stdout + result.stderr
    manifest = json.loads((tmp_path / "out" / "marlin_convert.json").read_text())
    assert set(manifest["left_out"]) == scales.keys()


def test_names_without_the_prefix_of_packed_linears(cli, tmp_path) -> None:
    linears = random_linears()
    source = save(tmp_path / "source", linears, gptq.pack, gptq_config())
    edit(source, lambda tensors: {name.removeprefix("model."): one for name, one in tensors.items()})
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert codes(tmp_path / "out").keys() == linears.keys()


@pytest.mark.parametrize(
    "pack, words",
    [
        (gptq.pack, gptq_config(dynamic={r"-:nothing": {}, r"+:.*\.down_proj$": {"bits": 8}})),
        (gptq.pack, AUTO_ROUND | {"extra_config": DOWN_HAS_8}),
        (gptq.pack, AUTO_ROUND | {"extra_config": {"mlp.*": {"bits": 4}, **DOWN_HAS_8}}),
        (gptq.pack, AUTO_ROUND | {"extra_config": {r"\.down_(x|proj)": {"bits": 8}}}),
        (
            compressed_tensors.pack,
            PLAIN
            | {
                "config_groups": PLAIN["config_groups"]
                | {
                    "group_1": {
                        "targets": ["re:.*down_proj"],
                        "weights": compressed_config(num_bits=8)["config_groups"]["group_0"]["weights"],
                    }
                }
            },
        ),
    ],
    ids=["gptq", "auto-round", "name before pattern", "pattern", "compressed-tensors"],
)  # fmt: skip
def test_linears_of_other_bits_are_repacked_where_bits_may_differ(pack, words, cli, text, tmp_path):
    down = "mlp.down_proj"
    linears = {
        name: random_linear(*LINEARS[down], 50, bits=8) if name.endswith(down) else layer
        for name, layer in random_linears().items()
    }
    source = save(tmp_path / "source", linears, pack, words)
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "marlin holds 4 bits, not 8" in result.stderr and "--format gptq holds all" in result.stderr
    before = tmp_path / "source"
    for format in ("gptq", "compressed-tensors", "gptq"):
        output = tmp_path / f"{before.name}-{format}"
        result = cli("quantize", before, "-o", output, "--format", format)
        assert result.exit_code == 0, result.stderr
        for name, layer in codes(output).items():
            assert layer.bits == (8 if name.endswith(down) else 4)
            assert torch.equal(layer.codes, linears[name].codes)
            assert torch.equal(layer.scales.float(), linears[name].scales.half().float())
        before = output
    words = ("--format", "gptq", "--group-size", 64, "--requantize", "--calibration", text, *SOLVE)
    result = cli("quantize", source, "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    assert {layer.bits for layer in codes(tmp_path / "out").values()} == {4}


BROKEN = PLAIN["config_groups"]["group_0"] | {"targets": ["re:*down_proj"]}
BROKEN |= {"weights": BROKEN["weights"] | {"num_bits": 8}}


@pytest.mark.parametrize(
    "pack, words",
    [
        (gptq.pack, gptq_config(dynamic={"+:*down_proj": {"bits": 8}})),
        (gptq.pack, AUTO_ROUND | {"extra_config": {"*down_proj": {"bits": 8}}}),
        (compressed_tensors.pack, PLAIN | {"config_groups": PLAIN["config_groups"] | {"group_1": BROKEN}}),
    ],
    ids=["gptq", "auto-round", "compressed-tensors"],
)
def test_a_pattern_that_is_none(pack, words, cli, tmp_path) -> None:
    source = save(tmp_path / "source", random_linears(), pack, words)
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "'*down_proj' is no regular expression" in result.stderr


@pytest.mark.parametrize(
    "pack, words, said",
    [
        (gptq.pack, None, ["gptq's layout", "neither config.json nor quantize_config.json"]),
        (compressed_tensors.pack, None, ["compressed-tensors's layout", "neither"]),
        (gptq.pack, AWQ_CONFIG, ["says awq", "shaped as gptq packs them", "quant_method gptq"]),
        (pack_awq, gptq_config(), ["says gptq", "shaped as awq packs them", "quant_method awq"]),
        (gptq.pack, PLAIN, ["says compressed-tensors", "'*.weight_packed'", "quant_method gptq"]),
        (compressed_tensors.pack, gptq_config(), ["says gptq", "quant_method compressed-tensors"]),
    ],
)
def test_words_of_another_layout_than_the_tensors_have(pack, words, said, cli, tmp_path) -> None:
    source = save(tmp_path / "source", random_linears(), pack, words)
    for command in (["quantize", source, "-o", tmp_path / "out"], ["verify", source, "--checks", "files"]):
        result = cli(*command)
        assert result.exit_code == 1
        assert all(part in result.stderr for part in said), result.stderr


def test_scales_that_float16_does_not_hold_are_solved_again(cli, text, tmp_path) -> None:
    def pack(layer):
        return {k: v.float() * 1.0001 if k == "scales" else v for k, v in gptq.pack(layer).items()}

    source = save(tmp_path / "source", random_linears(), pack, gptq_config())
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "in float16" in result.stderr and "--requantize" in result.stderr
    result = cli("quantize", source, "-o", tmp_path / "out", "--requantize", "--calibration", text, *SOLVE)
    assert result.exit_code == 0, result.stderr


def test_quantized_activations_are_no_obstacle_to_requantize(cli, text, tmp_path) -> None:
    words = compressed_config()
    words["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    source = save(tmp_path / "source", random_linears(), compressed_tensors.pack, words)
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "input_activations" in result.stderr and "--requantize" in result.stderr
    result = cli("quantize", source, "-o", tmp_path / "out", "--requantize", "--calibration", text, *SOLVE)
    assert result.exit_code == 0 and "left out: input_activations" in result.stdout + result.stderr


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A model whose weights are dense, and nothing says otherwise."""
    packed = save(tmp_path / "packed", random_linears(), gptq.pack, gptq_config())
    return dequantize(packed, tmp_path / "dense", torch.float16)


@pytest.mark.parametrize("place", ["quantize_config.json", "quant_config.json", "config.json"])
@pytest.mark.parametrize("words", [gptq_config(), PLAIN, {"quant_method": "bitsandbytes"}])
def test_words_of_codes_that_are_not_there_are_named_and_left_out(place, words, dense, cli, text, tmp_path):
    if place == "config.json":
        change(dense, quantization_config=words)
    else:
        (dense / place).write_text(json.dumps(words))
    result = cli("quantize", dense, "-o", tmp_path / "out", "--format", "gptq", "--calibration", text, *SOLVE)
    assert result.exit_code == 0, result.stderr
    assert f"{place}'s quantization_config" in result.stderr + result.stdout or place != "config.json"
    assert place in result.stdout + result.stderr and "none is packed" in result.stdout + result.stderr
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "gptq"
    # engines would look for codes
    result = cli("verify", dense, "--checks", "files")
    assert result.exit_code == 3 and "none is packed" in result.stdout


def test_scales_of_a_rounding_not_carried_out(dense, cli, text, tmp_path) -> None:
    change(dense, quantization_config=PLAIN | {"quantization_status": "frozen"})
    edit(dense, lambda tensors: tensors | {f"{FIRST}.weight_scale": torch.ones(128, 4)})
    words = ("--calibration", text, *SOLVE)
    result = cli("quantize", dense, "-o", tmp_path / "out", *words)
    assert result.exit_code == 1 and f"{FIRST}.weight_scale" in result.stderr
    assert "--requantize" in result.stderr
    result = cli("quantize", dense, "-o", tmp_path / "out", "--requantize", *words)
    assert result.exit_code == 0 and f"left out: {FIRST}.weight_scale" in result.stdout + result.stderr


def as_mlx(tensors: dict) -> dict:
    out = {}
    for name, one in tensors.items():
        if "_proj.weight" in name:
            linear = name.removesuffix(".weight")
            out[name] = torch.zeros(one.shape[0], one.shape[1] // 8, dtype=torch.uint32)
            out |= {
                f"{linear}.{x}": torch.ones(one.shape[0], one.shape[1] // 64) for x in ("scales", "biases")
            }
        else:
            out[name] = one
    return out


@pytest.mark.parametrize("words", [{"group_size": 64, "bits": 4}, None])
@pytest.mark.parametrize("flags", [(), ("--requantize",)])
def test_mlx_is_called_by_its_name(words, flags, dense, cli, tmp_path) -> None:
    change(dense, quantization=words, quantization_config=words)
    edit(dense, as_mlx)
    result = cli("quantize", dense, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 1 and "quantized by MLX" in result.stderr and "None" not in result.stderr


def test_the_config_of_a_wrapper_over_a_text_model_is_refused(dense, cli, tmp_path) -> None:
    change(dense, model_type="mistral3", text_config={"hidden_size": 128}, vision_config={"hidden_size": 64})
    result = cli("quantize", dense, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "of the architecture not in" in result.stderr
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "change_to, said",
    [
        ({"hidden_act": "new"}, ["hidden_act is 'new'", "correct it"]),
        ({"hidden_act": "new", "transformers_version": "99.1.0"}, ["'new'", "transformers 99.1.0 wrote it"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_scaling.type is 'su'", "'longrope'"]),
    ],
)
def test_a_word_that_transformers_does_not_know(change_to, said, dense, cli, tmp_path) -> None:
    change(dense, **change_to)
    result = cli("quantize", dense, "-o", tmp_path / "out")
    assert result.exit_code == 1 and all(part in result.stderr for part in said), result.stderr


def test_inspect_reads_the_same_words(cli, tmp_path) -> None:
    source = save(tmp_path / "source", random_linears(), marlin.pack, OF_MARLIN)
    found = json.loads(cli("inspect", source, "--json").stdout)
    assert (found["format"], found["bits"], found["packed"]) == ("marlin", [4], 14)
