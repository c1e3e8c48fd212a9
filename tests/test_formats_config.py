"""quantization_config: what is written is read again, what others wrote is understood or refused by name."""

import json
import re
from collections.abc import Sequence

import pytest

from marlin_convert.errors import FormatError
from marlin_convert.formats import FORMATS, Scheme, detect
from marlin_convert.matrix import Fate, Layout, Matrix, dense

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}

AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "iters": 200,
}


def fates(format: str, group_size: int = 128, skipped: Sequence[str] = ()) -> list[Fate]:
    """A linear that is packed in this format, and some that are left dense."""
    one = Fate(Matrix("model.layers.0.mlp.down_proj", 256, 256), Layout(format, 4, group_size))
    return [one, *(dense(Matrix(name, 256, 256), "float16", "skipped") for name in skipped)]


def compressed(**weights):
    config = FORMATS["compressed-tensors"].quantization_config(fates("compressed-tensors"))
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
    config = FORMATS[name].quantization_config(fates(name, group_size, skipped))
    scheme = detect(json.loads(json.dumps(config)))
    assert (scheme.format, scheme.bits, scheme.group_size) == (name, 4, group_size)
    assert scheme.symmetric and scheme.version == 1 and not scheme.act_order and not scheme.names
    patterns = [entry for entry in scheme.skipped if entry != "lm_head"]
    assert len(patterns) == len(skipped)
    for pattern, module in zip(patterns, skipped, strict=True):
        assert pattern == module or re.match(pattern, module)


def test_gptq_config_is_the_one_engines_load():
    write = FORMATS["gptq"].quantization_config
    assert write(fates("gptq")) == {
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
    (pattern,) = write(fates("gptq", skipped=["a.b"]))["dynamic"]
    assert pattern == r"-:^a\.b$"
    assert not re.match(pattern.removeprefix("-:"), "axb") and not re.match(
        pattern.removeprefix("-:"), "a.bc"
    )


def test_compressed_tensors_config_is_the_one_engines_load():
    config = FORMATS["compressed-tensors"].quantization_config(
        fates("compressed-tensors", -1, ["lm_head", "x"])
    )
    assert config["ignore"] == ["lm_head", "x"] and "sparsity_config" not in config
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)


KINDS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 8),
    **dict.fromkeys(("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.c_proj"), 4),
}


def mixture(format: str, *, bits: dict[str, int], odd: str | None = None) -> list[Fate]:
    """Two blocks of linears with so many bits; down_proj has groups of 64, and one linear alone of 32."""
    found = []
    for block in range(2):
        for path in (*bits, "mlp.down_proj"):
            name = f"model.language_model.layers.{block}.{path}"
            size = 32 if name == odd else 64 if path == "mlp.down_proj" else 128
            found.append(Fate(Matrix(name, 256, 256), Layout(format, bits.get(path, 4), size)))
    return found


@pytest.mark.parametrize("odd", [None, "model.language_model.layers.1.self_attn.o_proj"])
@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "marlin"])
def test_what_differs_is_named_whatever_engines_put_before_it(format, prefix, odd):
    bits = KINDS if format != "marlin" else dict.fromkeys(KINDS, 4)
    written = mixture(format, bits=bits, odd=odd)
    scheme = detect(json.loads(json.dumps(FORMATS[format].quantization_config(written))))
    for fate in written:
        stored = scheme.of(prefix + fate.name.removeprefix("model.language_model."))
        assert (stored.bits, stored.group_size) == (fate.layout.bits, fate.layout.group_size), fate.name


def test_engines_find_what_they_fuse():
    """vLLM asks `dynamic` with the name of the matrix that it makes of q, k and v; groups have no class."""
    config = FORMATS["gptq"].quantization_config(mixture("gptq", bits=KINDS))
    found = [
        said
        for pattern, said in config["dynamic"].items()
        if re.match(pattern.removeprefix("+:"), "language_model.model.layers.11.self_attn.qkv_proj")
    ]
    assert found == [{"bits": 8, "group_size": 128}] and (config["bits"], config["group_size"]) == (4, 128)
    config = FORMATS["compressed-tensors"].quantization_config(mixture("compressed-tensors", bits=KINDS))
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert len(targets) == 3 and all(target.startswith("re:") for one in targets for target in one)


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
        ({}, "no quant_method"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 4, "group_size": 64}, "'mlx'"),
        ({**GPTQ, "bits": "four"}, "'four'"),
        ({**GPTQ, "sym": "perhaps"}, "'perhaps'"),
        ({**GPTQ, "adapter": {"name": "lora"}}, "adapter"),
        ({**GPTQ, "dynamic": {"+:a": {"bits": 3}}}, "bits is 3"),
        ({**GPTQ, "dynamic": {"a": {"pack_dtype": "int64"}}}, "dynamic override 'a' with pack_dtype"),
        ({**compressed(), "config_groups": {"a": {}, "b": {}}}, "no config group has weights"),
        ({**compressed(), "config_groups": []}, "no config group has weights"),
        ({**AUTO_ROUND, "packing_format": "auto_round:exllamav2"}, "'auto_round:exllamav2'"),
        ({**AUTO_ROUND, "data_type": "mx_fp"}, "'mx_fp'"),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": 64}, "groups of 64"),
        ({"quant_method": "marlin_24", "bits": 8, "group_size": 128}, "8 bits in marlin-24"),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": 128, "sym": False}, "not symmetric"),
        ({"quant_method": "marlin_24", "bits": 4, "group_size": 128, "unpruned": "a"}, "unpruned"),
        ({"quant_method": "marlin_24", "checkpoint_format": "marlin"}, "marlin_24"),
        ({"quant_method": "marlin", "checkpoint_format": "marlin_24"}, "'marlin'"),
        ({**GPTQ, "bits": 3}, "bits is 3"),
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
        ({**compressed(), "config_groups": [1]}, "must be an object"),
        ({**compressed(), "config_groups": {"a": 1}}, "must be an object"),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**compressed(), "transform_config": {"config_groups": {"r": {}}}}, "transform_config"),
    ],
)
def test_detect_refuses_by_name(config, named):
    with pytest.raises(FormatError, match=re.escape(named)):
        detect(config)


@pytest.mark.parametrize("stored", ["sparse-24-bitmask", "naive-quantized", "float-quantized"])
def test_other_compressed_tensors_formats_are_refused(stored):
    config = compressed()
    config["format"] = config["config_groups"]["group_0"]["format"] = stored
    with pytest.raises(FormatError, match=str(stored)):
        detect(config)


@pytest.mark.parametrize("asked", ["input_activations", "output_activations"])
def test_quantized_activations_are_beyond_the_weights(asked):
    config = compressed()
    config["config_groups"]["group_0"][asked] = {"num_bits": 8}
    assert detect(config).beyond == f"{asked}: quantized activations"
    assert detect({**AUTO_ROUND, "act_bits": 8}).beyond == "act_bits is 8: quantized activations"
    assert detect({**AUTO_ROUND, "act_bits": 16}).beyond is None


def test_a_refusal_always_has_a_way_on():
    for config in ({}, {"quant_method": "bitsandbytes"}, {**GPTQ, "bits": 3}, compressed(type="float")):
        with pytest.raises(FormatError) as refused:
            detect(config)
        assert "start from the model it was made from" in (refused.value.hint or "")


def groups(**others):
    """A compressed-tensors config whose linears are in several groups."""
    config = compressed()
    config["config_groups"] |= {
        name: {"targets": targets, "weights": compressed_weights(**weights)}
        for name, (targets, weights) in others.items()
    }
    return config


@pytest.mark.parametrize(
    "config",
    [
        {**compressed(), "quantization_status": "frozen"},
        {**compressed(), "quantization_status": None},
        {**compressed(), "kv_cache_scheme": {"num_bits": 8}},
        {**compressed(), "quant_method": None},
        {**compressed(), "quant_method": "compressed_tensors"},
        groups(group_1=(["re:.*down_proj"], {}), group_2=(["Linear"], {})),
        {**compressed(), "config_groups": {"W4A16": ["Linear"]}},
        {**compressed(num_bits="4", group_size="128", symmetric="true", dynamic=None)},
        {**compressed(strategy=None, type=None)},
        {**compressed(), "config_groups": {"kv": {"targets": ["x"]}} | compressed()["config_groups"]},
    ],
)
def test_words_that_change_nothing_of_what_is_stored(config):
    assert detect(config) == detect(compressed())


@pytest.mark.parametrize(
    "config, scheme",
    [
        ({**GPTQ, "bits": "4", "group_size": "128", "sym": "True"}, Scheme("gptq", 4, 128)),
        ({**GPTQ, "sym": "false", "desc_act": None}, Scheme("gptq", 4, 128, symmetric=False)),
        ({**GPTQ, "quant_method": "gptq_marlin"}, Scheme("gptq", 4, 128)),
        ({**GPTQ, "dynamic": {"+:a": {"mse": 2.0, "damp_percent": 0.1, "bits": 4}}}, Scheme("gptq", 4, 128)),
        ({**AWQ, "quant_method": "awq_marlin"}, Scheme("awq", 4, 128, symmetric=False)),
        ({"quant_method": "marlin", "group_size": 128}, Scheme("marlin", 4, 128)),
        (AUTO_ROUND, Scheme("gptq", 4, 128)),
        ({**AUTO_ROUND, "quant_method": "intel/auto-round", "sym": False}, Scheme("gptq", 4, 128, False)),
        ({**AUTO_ROUND, "packing_format": "auto_round:gptq_marlin"}, Scheme("gptq", 4, 128)),
        ({**AUTO_ROUND, "packing_format": None, "backend": "gptq:exllamav2"}, Scheme("gptq", 4, 128)),
        ({**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, Scheme("awq", 4, 128)),
        ({**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 16}, "a": {"bits": 4}}}, Scheme("gptq", 4, 128)),
    ],
)  # fmt: skip
def test_other_words_for_what_is_known(config, scheme):
    assert detect(config) == scheme


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "dynamic": {r"-:.*\.gate_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 32}}},
        {**AUTO_ROUND, "extra_config": {"layers.0.down_proj": {"bits": 8, "group_size": 32}}},
        groups(group_1=([r"re:.*down_proj$"], {"num_bits": 8, "group_size": 32})),
        groups(group_1=(["down_proj"], {"num_bits": 8, "group_size": 32})),
    ],
)
def test_a_linear_stored_otherwise_than_the_rest(config):
    scheme = detect(config)
    assert (scheme.bits, scheme.group_size) == (4, 128)
    other = scheme.of("layers.0.down_proj")
    assert (other.format, other.bits, other.group_size) == (scheme.format, 8, 32)
    assert scheme.of("layers.0.up_proj") is scheme


def test_what_is_skipped_is_named_whole():
    scheme = Scheme("marlin", 4, 128, skipped=("lm_head", "model.layers.1", "layers.2.mlp.up_proj"))
    skipped = ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")
    packed = ("model.layers.11.mlp.up_proj", "model.layers.2.mlp.down_proj", "model.layers.12.mlp.up_proj")
    assert all(map(scheme.skips, skipped)) and not any(map(scheme.skips, packed))
