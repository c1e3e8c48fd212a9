"""quantization_config: what is written is read again, what others wrote is understood or refused by name."""

import json
import re

import pytest

from marlin_convert.errors import FormatError
from marlin_convert.formats import FORMATS, Scheme, detect

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def compressed(**weights):
    config = FORMATS["compressed-tensors"].quantization_config(bits=4, group_size=128, skipped=[])
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


def compressed_weights(**other):
    """The weights of a config group that names no format of its own."""
    return compressed(**other)["config_groups"]["group_0"]["weights"]


COMPRESSED_24 = ("weight_packed", "meta", "scale_packed")


def compressed_24(**weights):
    config = compressed(**weights)
    config["format"] = config["config_groups"]["group_0"]["format"] = "marlin-24"
    return config


@pytest.mark.parametrize("name", ["marlin", "marlin-24", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("skipped", [[], ["model.layers.0.mlp.up_proj"]])
def test_written_configs_are_read_again(name, group_size, skipped):
    config = FORMATS[name].quantization_config(bits=4, group_size=group_size, skipped=skipped)
    scheme = detect(json.loads(json.dumps(config)))
    assert (scheme.format, scheme.bits, scheme.group_size) == (name, 4, group_size)
    assert scheme.symmetric and scheme.version == 1 and not scheme.act_order and not scheme.names
    patterns = [entry for entry in scheme.skipped if entry != "lm_head"]
    assert len(patterns) == len(skipped)
    for pattern, module in zip(patterns, skipped, strict=True):
        assert pattern == module or re.match(pattern, module)


def test_gptq_config_is_the_one_engines_load():
    write = FORMATS["gptq"].quantization_config
    assert write(bits=4, group_size=128, skipped=[]) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "damp_percent": 0.01,
        "true_sequential": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
    (pattern,) = write(bits=4, group_size=128, skipped=["a.b"])["dynamic"]
    assert pattern == r"-:^a\.b$"
    assert not re.match(pattern.removeprefix("-:"), "axb") and not re.match(
        pattern.removeprefix("-:"), "a.bc"
    )


def test_compressed_tensors_config_is_the_one_engines_load():
    config = FORMATS["compressed-tensors"].quantization_config(
        bits=4, group_size=-1, skipped=["lm_head", "x"]
    )
    assert config["ignore"] == ["lm_head", "x"] and "sparsity_config" not in config
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)


@pytest.mark.parametrize(
    "config, scheme",
    [
        (GPTQ, Scheme("gptq", 4, 128)),
        ({**GPTQ, "bits": 8, "sym": False}, Scheme("gptq", 8, 128, symmetric=False)),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}, Scheme("gptq", 4, 128, version=2)),
        ({**GPTQ, "format": "gptq_v2", "pack_dtype": "int32"}, Scheme("gptq", 4, 128, version=2)),
        ({**GPTQ, "desc_act": True, "is_marlin_format": False}, Scheme("gptq", 4, 128, act_order=True)),
        ({**GPTQ, "dynamic": {r"-:.*\.o_proj": {}}}, Scheme("gptq", 4, 128, skipped=(r".*\.o_proj",))),
        ({**GPTQ, "quant_method": None, "method": "gptq"}, Scheme("gptq", 4, 128)),
        ({key: GPTQ[key] for key in GPTQ if key != "quant_method"}, Scheme("gptq", 4, 128)),
        ({**GPTQ, "checkpoint_format": "marlin"}, Scheme("marlin", 4, 128)),
        ({**GPTQ, "is_marlin_format": True, "group_size": -1}, Scheme("marlin", 4, -1)),
        ({**GPTQ, "quant_method": "marlin"}, Scheme("marlin", 4, 128)),
        ({"quant_method": "marlin", "bits": 4, "group_size": 128}, Scheme("marlin", 4, 128)),
        ({**GPTQ, "checkpoint_format": "marlin_24"}, Scheme("marlin-24", 4, 128)),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": -1}, Scheme("marlin-24", 4, -1)),
        (
            {"quant_method": "marlin_24", "bits": 4, "group_size": 128, "unpruned": ["a", "b"]},
            Scheme("marlin-24", 4, 128, unpruned=frozenset("ab")),
        ),
        (
            {
                **compressed(),
                "format": "marlin-24",
                "config_groups": {"a": {"weights": compressed_weights()}},
            },
            Scheme("marlin-24", 4, 128, names=COMPRESSED_24, skipped=("lm_head",)),
        ),
        (AWQ, Scheme("awq", 4, 128, symmetric=False)),
        ({**AWQ, "modules_to_not_convert": ["gate"]}, Scheme("awq", 4, 128, False, skipped=("gate",))),
        (
            {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
            Scheme("awq", 4, 64, symmetric=False),
        ),
        (
            {**AWQ, "version": "marlin", "zero_point": False},
            Scheme("marlin", 4, 128, names=("qweight", "scales")),
        ),
        (compressed(), Scheme("compressed-tensors", 4, 128, skipped=("lm_head",))),
        (
            compressed(num_bits=8, symmetric=False, strategy="channel", group_size=None, actorder="weight"),
            Scheme("compressed-tensors", 8, -1, symmetric=False, skipped=("lm_head",)),
        ),
        (
            compressed(actorder="group"),
            Scheme("compressed-tensors", 4, 128, skipped=("lm_head",), act_order=True),
        ),
    ],
)
def test_detect(config, scheme):
    assert detect(config) == scheme


@pytest.mark.parametrize(
    "config, named",
    [
        ({}, "None"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": 64}, "groups of 64"),
        ({"quant_method": "marlin_24", "bits": 8, "group_size": 128}, "8 bits in marlin-24"),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": 128, "sym": False}, "not symmetric"),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": 128, "unpruned": "a"}, "unpruned"),
        ({"quant_method": "marlin_24", "checkpoint_format": "marlin"}, "marlin_24"),
        ({"quant_method": "marlin", "checkpoint_format": "marlin_24"}, "'marlin'"),
        ({**GPTQ, "bits": 3}, "bits is 3"),
        ({**GPTQ, "bits": "4"}, "'4'"),
        ({**GPTQ, "bits": True}, "True"),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 4}, "group_size is missing"),
        ({**GPTQ, "checkpoint_format": "marlin_24", "bits": 8}, "8 bits in marlin-24"),
        (compressed_24(num_bits=8), "8 bits in marlin-24"),
        (compressed_24(symmetric=False), "not symmetric"),
        (compressed_24(group_size=32), "groups of 32"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "gptq_p"),
        ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}, "contradicts"),
        ({**GPTQ, "checkpoint_format": "gptq", "is_marlin_format": True}, "contradicts"),
        ({**GPTQ, "checkpoint_format": "marlin", "sym": False}, "not symmetric"),
        ({**GPTQ, "checkpoint_format": "marlin", "bits": 8}, "bits is 8"),
        ({**GPTQ, "pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation 'hadamard'"),
        ({**GPTQ, "dynamic": {"+:a": {"bits": 8}}}, "+:a"),
        ({**GPTQ, "dynamic": {"a": {"bits": 8}}}, "'a'"),
        ({**GPTQ, "dynamic": ["-:a"]}, "dynamic must be an object"),
        ({**AWQ, "version": "gemv_fast"}, "gemv_fast"),
        ({**AWQ, "version": "marlin"}, "not symmetric"),
        ({**AWQ, "bits": 8}, "bits is 8"),
        ({**AWQ, "modules_to_not_convert": "gate"}, "modules_to_not_convert"),
        ({**AWQ, "modules_to_not_convert": 5}, "modules_to_not_convert"),
        (compressed(num_bits=3), "num_bits is 3"),
        (compressed(type="float"), "integer weights"),
        (compressed(dynamic=True), "static"),
        (compressed(strategy="tensor"), "'tensor'"),
        ({**compressed(), "config_groups": {"a": {}, "b": {}}}, "there are 2"),
        ({**compressed(), "config_groups": []}, "there are 0"),
        ({**compressed(), "config_groups": [1]}, "must be an object"),
        ({**compressed(), "config_groups": {"a": 1}}, "must be an object"),
        ({**compressed(), "quantization_status": "frozen"}, "frozen"),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**compressed(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**compressed(), "transform_config": {"config_groups": {"r": {}}}}, "transform_config"),
    ],
)
def test_detect_refuses_by_name(config, named):
    with pytest.raises(FormatError, match=re.escape(named)):
        detect(config)


@pytest.mark.parametrize("stored", ["sparse-24-bitmask", "naive-quantized", "float-quantized", None])
def test_other_compressed_tensors_formats_are_refused(stored):
    config = compressed()
    config["format"] = config["config_groups"]["group_0"]["format"] = stored
    with pytest.raises(FormatError, match=str(stored)):
        detect(config)


def test_quantized_activations_are_refused():
    config = compressed()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(FormatError, match="input_activations"):
        detect(config)


def test_what_is_skipped_is_named_whole():
    scheme = Scheme("marlin", 4, 128, skipped=("lm_head", "model.layers.1", "layers.2.mlp.up_proj"))
    skipped = ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")
    packed = ("model.layers.11.mlp.up_proj", "model.layers.2.mlp.down_proj", "model.layers.12.mlp.up_proj")
    assert all(map(scheme.skips, skipped)) and not any(map(scheme.skips, packed))
