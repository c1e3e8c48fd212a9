"""A model that is already quantized: its codes reach every format untouched, or are refused first."""

import hashlib
import json
import time
from dataclasses import replace

import pytest
import rows
import torch
from packed_models import (
    FIRST,
    SOURCES,
    compressed_config,
    gptq_config,
    random_linear,
    random_linears,
    save,
    without,
)
from packed_models import make as make_source
from safetensors.torch import load_file, save_file

from marlin_convert import recipe
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.commands.quantize import Job, quantize
from marlin_convert.errors import ConvertError
from marlin_convert.formats import compressed_tensors, gptq, marlin_24
from marlin_convert.hub import Source
from marlin_convert.quantized import same_codes


def read(directory):
    """Every packed linear of a checkpoint."""
    weights = Weights(Checkpoint.open(directory))
    return {name: weights.quantized(name) for name in weights.packed_linears()}


def repack(source, output, format, **settings):
    job = Job(
        source=Source(source, source.name, None),
        output=output,
        recipe=recipe.load(recipe.DEFAULT).changed({"format": format}),
        device=torch.device("cpu"),
        **settings,
    )
    quantize(job)
    return output


def digests(directory):
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.iterdir())
    }


def equal(a, b):
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert same_codes(found[name].codes, layer.codes), name
        assert torch.equal(found[name].scales.float(), layer.scales.float()), name
        assert (found[name].bits, found[name].group_size) == (layer.bits, layer.group_size)
        assert equal(found[name].zeros, layer.zeros), name
        assert equal(found[name].group_of_row, layer.group_of_row), name


# What a format cannot hold, and what the message says of it.
REFUSED = {
    ("gptq-8bit", "marlin"): "marlin holds 4 bits, not 8",
    ("gptq-asymmetric", "marlin"): "marlin has no zero points, and the layer is not symmetric",
    ("gptq-asymmetric-labelled-symmetric", "marlin"): "marlin has no zero points",
    ("gptq-v2-asymmetric", "marlin"): "marlin has no zero points",
    ("gptq-v2-zero-0", "marlin"): "marlin has no zero points",
    ("gptq-v2-zero-0", "gptq"): "gptq stores zero points minus one, and some of the layer are 0",
    ("gptq-act-order", "marlin"): "marlin has no group order, and the groups of the layer follow activation",
    ("gptq-act-order", "compressed-tensors"): "compressed-tensors has no group order",
    ("gptq-act-order-unlabelled", "marlin"): "marlin has no group order",
    ("gptq-act-order-unlabelled", "compressed-tensors"): "compressed-tensors has no group order",
    ("gptq-v2-act-order", "marlin"): "marlin has no zero points",
    ("gptq-v2-act-order", "compressed-tensors"): "compressed-tensors has no group order",
    ("awq-asymmetric", "marlin"): "marlin has no zero points",
    ("compressed-tensors-8bit", "marlin"): "marlin holds 4 bits, not 8",
    ("compressed-tensors-asymmetric", "marlin"): "marlin has no zero points",
}
# marlin-24 holds no more of a layer than marlin, no other groups, and nothing that is not 2:4.
GROUPS = "marlin-24 needs groups of 128 rows or one for all 128, has 32"
REFUSED |= {
    (source, "marlin-24"): REFUSED.get((source, "marlin"), GROUPS).replace("marlin ", "marlin-24 ")
    for source, (kind, _, _) in SOURCES.items()
    if "sparse" not in kind
}
NOT_SPARSE = ("gptq-channel", "compressed-tensors-channel")
for source in NOT_SPARSE:
    del REFUSED[source, "marlin-24"]
TARGETS = ("marlin", "gptq", "compressed-tensors", "marlin-24")
EVERY = [
    (source, target)
    for source in SOURCES
    for target in TARGETS
    if target != "marlin-24" or source not in NOT_SPARSE
]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A source by name: (directory, its linears); made once, and not to be changed."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("sources") / name
            made[name] = directory, make_source(name, directory)
        return made[name]

    return make


@pytest.fixture
def refuse(cli, tmp_path):
    """Run a repack that must be refused before anything is written; what it prints."""

    def run(source, *words, format="marlin"):
        before = digests(source)
        result = cli(
            "quantize", source, "-o", tmp_path / "out", "--format", format, "--device", "cpu", *words
        )
        assert result.exit_code == 1, result.output
        assert "Error: " in result.stderr and "Traceback" not in result.output
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        assert digests(source) == before
        return result.stderr

    return run


@pytest.mark.parametrize("source, target", [pair for pair in EVERY if pair not in REFUSED])
def test_codes_and_scales_are_the_sources(make, tmp_path, source, target):
    directory, linears = make(source)
    before = digests(directory)
    output = repack(directory, tmp_path / "out", target)
    assert_same(read(output), linears)
    assert digests(directory) == before

    dense, copied = (load_file(path / "model.safetensors") for path in (directory, output))
    norms = [name for name in dense if "norm" in name]
    for name in [*norms, "model.embed_tokens.weight", "lm_head.weight"]:
        assert torch.equal(copied[name], dense[name])
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    symmetric = all(layer.zeros is None for layer in linears.values())
    if target == "compressed-tensors":
        assert config["config_groups"]["group_0"]["weights"]["symmetric"] is symmetric
    else:
        act_order = any(layer.group_of_row is not None for layer in linears.values())
        assert (config["sym"], config["desc_act"]) == (symmetric, act_order)
        assert (config["bits"], config["group_size"]) == (
            linears[FIRST].bits,
            SOURCES[source][0].get("group_size", 32),
        )
    assert "sparsity_config" not in (output / "config.json").read_text()
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["requantized"] is False and manifest["calibration"] is None
    assert rows.is_sparse(manifest) == ("marlin-24" in (source[:9], target))
    assert rows.unpruned(manifest) == {}
    assert manifest["source"]["quantization"] == Weights(Checkpoint.open(directory)).scheme.format
    assert {row["name"] for row in rows.worked_on(manifest)} == linears.keys()


@pytest.mark.parametrize("source, target", REFUSED)
def test_what_a_format_cannot_hold_is_refused(make, refuse, source, target):
    said = refuse(make(source)[0], format=target)
    assert f"{FIRST} has 128 inputs and 128 outputs; " in said
    assert REFUSED[source, target] in said and "(and 13 more linears)" in said
    assert "--requantize" in said


@pytest.mark.parametrize(
    "chain", [("marlin", "compressed-tensors", "gptq"), ("compressed-tensors", "marlin", "gptq")]
)
def test_a_chain_of_formats_ends_where_it_began(quantized, tmp_path, chain):
    directory = quantized("gptq")
    for number, format in enumerate(chain):
        directory = repack(directory, tmp_path / str(number), format)
    for name in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (directory / name).read_bytes() == (quantized("gptq") / name).read_bytes()


@pytest.mark.parametrize("source", ["gptq-asymmetric", "gptq-8bit"])
def test_what_marlin_cannot_hold_goes_there_and_back(make, tmp_path, source):
    there = repack(make(source)[0], tmp_path / "there", "compressed-tensors")
    back = repack(there, tmp_path / "back", "gptq")
    first, again = (load_file(path / "model.safetensors") for path in (make(source)[0], back))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


# 2:4


UNPRUNED = "mlp.down_proj"


def mixed_linears(every=UNPRUNED):
    """Linears that are 2:4, but for those of a kind."""
    dense = random_linears(group_size=128)
    return {
        name: dense[name] if name.endswith(every) else layer
        for name, layer in random_linears(group_size=128, sparse=True).items()
    }


@pytest.fixture
def mixed(tmp_path):
    """A GPTQ model of which a part is 2:4, its linears, and what becomes of it in marlin-24."""
    linears = mixed_linears()
    source = save(tmp_path / "source", linears, gptq.pack, gptq_config(group_size=128))
    settings = recipe.load(recipe.DEFAULT).changed({"format": "marlin-24", "unpruned": (f"*.{UNPRUNED}",)})
    quantize(Job(Source(source, source.name, None), tmp_path / "mixed", settings, torch.device("cpu")))
    return source, linears, tmp_path / "mixed"


@pytest.mark.parametrize("source", ["gptq-sparse", "marlin-sparse", "compressed-tensors-sparse"])
@pytest.mark.parametrize("target", ["gptq", "marlin", "compressed-tensors"])
def test_marlin_24_and_back_is_byte_for_byte(make, tmp_path, source, target):
    there = repack(make(source)[0], tmp_path / "there", "marlin-24")
    back = repack(there, tmp_path / "back", target)
    straight = repack(make(source)[0], tmp_path / "straight", target)
    for name in ("model.safetensors", "config.json"):
        assert (back / name).read_bytes() == (straight / name).read_bytes()
    again = repack(back, tmp_path / "again", "marlin-24")
    assert (again / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


@pytest.mark.parametrize("source", ["marlin-24", "marlin-24-compressed"])
def test_what_a_peer_kept_is_kept(make, tmp_path, source):
    output = repack(make(source)[0], tmp_path / "out", "marlin-24")
    peers, ours = (read(directory) for directory in (make(source)[0], output))
    assert all(torch.equal(ours[name].kept, layer.kept) for name, layer in peers.items())
    assert json.loads((output / "config.json").read_text())["quantization_config"] == {
        "quant_method": "marlin_24",
        "bits": 4,
        "group_size": SOURCES[source][0]["group_size"],
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "marlin_24",
        "modules_to_not_convert": [],
        "unpruned": [],
    }


def test_what_is_not_sparse_is_refused_with_its_first_quad(tmp_path, refuse):
    linears = random_linears(group_size=128, sparse=True)
    name = "model.layers.1.mlp.up_proj"
    linears[name].codes[40:44, 200] = torch.tensor([9, 3, 8, 7])
    source = save(tmp_path / "source", linears, gptq.pack, gptq_config(group_size=128))
    said = refuse(source, format="marlin-24")
    assert (
        f"Error: {name} is not 2:4: 1 of 8192 quads have more than two non-zeros; the first, "
        "rows 40 to 43 of column 200, has codes 9, 3, 8, 7.\n" in said
    )
    # gate is fused with up: both or none
    assert f"--unpruned 'model.layers.1.mlp.gate_proj' --unpruned '{name}'" in said
    said = refuse(source, "--unpruned", name, format="marlin-24")
    assert f"Error: {name} is not 2:4, model.layers.1.mlp.gate_proj beside it not" in said
    assert "Hint: add --unpruned 'model.layers.1.mlp.gate_proj'" in said


@pytest.mark.parametrize("source", NOT_SPARSE)
def test_a_model_that_was_never_pruned_is_refused(make, refuse, source):
    said = refuse(make(source)[0], format="marlin-24")
    assert f"Error: {FIRST} is not 2:4: " in said and "(and 13 more linears)" in said
    assert "--format marlin holds it" in said and "--unpruned '*.down_proj'" in said


def test_a_repack_that_is_asked_to_prune_says_what_does(make, refuse):
    said = refuse(make("gptq-channel")[0], "--sparsity", "2:4", format="marlin-24")
    assert f"Error: {FIRST} is not 2:4: " in said
    assert "a repack does not prune: --requantize does" in said and "--unpruned" not in said


def test_quantize_prunes_only_when_asked(tinypy, make, refuse):
    for words in ((tinypy,), (make("gptq-sparse")[0], "--requantize")):
        said = refuse(*words, format="marlin-24")
        assert "Error: marlin-24 holds codes that are 2:4, and the source is not known to be" in said
        assert "--sparsity 2:4" in said


@pytest.mark.parametrize("pattern", ["*", "*.mlp.*", "*.nothing"])
def test_unpruned_must_make_sense(make, refuse, pattern):
    source, format = ("gptq", "marlin") if pattern == "*.mlp.*" else ("gptq-sparse", "marlin-24")
    said = refuse(make(source)[0], "--unpruned", pattern, format=format)
    meant = "matches no linear" if pattern == "*.nothing" else "leaves no linear that is 2:4"
    assert f"Error: --unpruned {pattern!r} {meant}" in said


def test_a_part_that_is_sparse(mixed):
    _, linears, output = mixed
    names = [name for name in linears if name.endswith(UNPRUNED)]
    found = Weights(Checkpoint.open(output))
    assert {name: found.scheme_of(name).format for name in linears} == {
        name: "marlin" if name in names else "marlin-24" for name in linears
    }
    assert_same(read(output), linears)
    tensors = {name.rpartition(".")[2] for name in found.checkpoint.tensors if UNPRUNED in name}
    assert tensors == {"B", "s"}
    assert json.loads((output / "config.json").read_text())["quantization_config"]["unpruned"] == names
    manifest = json.loads((output / MANIFEST).read_text())
    assert rows.is_sparse(manifest)
    assert rows.unpruned(manifest) == dict.fromkeys(names, f"unpruned by '*.{UNPRUNED}'")
    assert manifest["bits_per_weight"] == pytest.approx(
        3.125 + 2 * 128 * 256 / sum(layer.k * layer.n for layer in linears.values()), abs=1e-4
    )


def test_a_part_that_is_sparse_goes_through_all_formats(mixed, tmp_path):
    """What is not 2:4 is known where no layout tells, from the manifest."""
    _, linears, directory = mixed
    first = directory
    for number, format in enumerate(("gptq", "compressed-tensors", "marlin", "marlin-24")):
        directory = repack(directory, tmp_path / str(number), format)
        assert_same(read(directory), linears)
        manifest = json.loads((directory / MANIFEST).read_text())
        assert rows.is_sparse(manifest)
        assert set(rows.unpruned(manifest).values()) == {"not 2:4 in the source"}
    for name in ("model.safetensors", "config.json"):
        assert (directory / name).read_bytes() == (first / name).read_bytes()


def test_a_part_that_is_sparse_beside_what_is_left_dense(tmp_path, cli):
    linears = {name: layer for name, layer in mixed_linears().items() if not name.endswith("o_proj")}
    source = save(tmp_path / "source", linears, gptq.pack, gptq_config(group_size=128))
    tensors = load_file(source / "model.safetensors")
    for block in range(2):
        tensors[f"model.layers.{block}.self_attn.o_proj.weight"] = torch.ones(128, 128).half()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    words = ("--format", "marlin-24", "--unpruned", f"*.{UNPRUNED}", "--dry-run")
    plan = json.loads(cli("quantize", source, "-o", tmp_path / "out", *words, "--json", "-v").stdout)
    fates = {row["name"].removeprefix("model.layers.0."): row for row in plan["matrices"]}
    assert plan["sparsity"] == "2:4"
    row = fates["self_attn.q_proj"]
    assert (row["format"], row["sparse"], "reason" in row) == ("marlin-24", True, False)
    row = fates["self_attn.o_proj"]
    assert (row["format"], row["reason"]) == ("dense", "dense in the source")
    row = fates[UNPRUNED]
    assert (row["format"], row["reason"]) == ("marlin", f"unpruned by '*.{UNPRUNED}'") and "sparse" not in row
    lines = cli("quantize", source, "-o", tmp_path / "out", *words).stdout.splitlines()
    assert any(line.endswith("bits per weight, 2:4") for line in lines)
    assert f"    model.layers.0.{UNPRUNED}: marlin, unpruned by '*.{UNPRUNED}'" in lines
    assert cli("quantize", source, "-o", tmp_path / "out", *words[:-1], "-q").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert_same(read(tmp_path / "out"), linears)


def test_a_config_that_does_not_know_its_tensors(mixed, refuse):
    """The config says how each linear is stored; tensors of another layout are not of the model."""
    directory = mixed[2]
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    for unpruned in ([], [*whole["quantization_config"]["unpruned"], FIRST]):
        config = whole | {"quantization_config": whole["quantization_config"] | {"unpruned": unpruned}}
        path.write_text(json.dumps(config))
        said = refuse(directory, format="gptq")
        assert "of the architecture not in mixed" in said


def test_senseless_metadata_is_refused_before_anything_is_written(tmp_path, refuse):
    linears = random_linears(group_size=128, sparse=True)

    def pack(layer):
        packed = marlin_24.pack(layer)
        if layer is linears["model.layers.1.mlp.down_proj"]:
            packed["B_meta"][0, 0] &= ~15
        return packed

    source = save(
        tmp_path / "source", linears, pack, gptq_config(checkpoint_format="marlin_24", group_size=128)
    )
    said = refuse(source, format="gptq")
    assert (
        "Error: model.layers.1.mlp.down_proj: the metadata of 1 of 8192 quads names no two rows; "
        "the first, rows 0 to 3 of column 0, has 0." in said
    )


def test_one_asymmetric_linear_makes_all_store_zero_points(tmp_path):
    linears = random_linears()
    linears[FIRST] = random_linear(128, 128, 0, asymmetric=True)
    source = save(tmp_path / "source", linears, gptq.pack, gptq_config())
    output = repack(source, tmp_path / "out", "compressed-tensors")
    assert_same(read(output), linears)
    tensors = Checkpoint.open(output).tensors
    assert sum(name.endswith(".weight_zero_point") for name in tensors) == len(linears)


def test_the_one_linear_that_does_not_fit_is_named(tmp_path, refuse):
    name = "model.layers.1.mlp.up_proj"
    linears = random_linears()
    linears[name] = random_linear(128, 256, 0, act_order=True)
    said = refuse(save(tmp_path / "source", linears, gptq.pack, gptq_config(desc_act=True)))
    assert f"Error: {name} has 128 inputs and 256 outputs; marlin has no group order" in said


def test_many_blocks_and_shards(tmp_path):
    """Names in a file go 1, 10, 2; blocks are written as they are numbered."""
    linears = random_linears(blocks=11)
    source = save(tmp_path / "source", linears, gptq.pack, gptq_config(), blocks=11)
    threads = torch.get_num_threads()
    output = repack(source, tmp_path / "out", "marlin", max_shard_size=200_000)
    assert len(list(output.glob("model-*.safetensors"))) > 5
    assert_same(read(output), linears)
    assert torch.get_num_threads() == threads


def test_an_interrupted_repack_is_resumed(make, tmp_path):
    source, _ = make("gptq")
    whole = repack(source, tmp_path / "whole", "marlin")

    def stop(blocks, total):
        yield 0
        progress = tmp_path / "out.partial" / "progress.json"
        while not json.loads(progress.read_text())["done"]["blocks"]:
            time.sleep(0.01)
        raise KeyboardInterrupt

    job = Job(
        Source(source, source.name, None), tmp_path / "out", recipe.load(recipe.DEFAULT), torch.device("cpu")
    )
    with pytest.raises(KeyboardInterrupt):
        quantize(job, stop)
    begun = []
    quantize(replace(job, resume=True), lambda blocks, total: begun.append(blocks.start) or blocks)
    assert begun == [1]
    assert digests(job.output).keys() - digests(whole).keys() == {
        job.output / path.name for path in whole.iterdir()
    }
    for path in whole.iterdir():
        assert (job.output / path.name).read_bytes() == path.read_bytes()


def test_the_group_size_of_the_source_is_kept(make, cli, refuse, tmp_path):
    source, linears = make("gptq")
    said = refuse(source, "--group-size", "128")
    assert "quantized with group size 32, which a repack keeps, not 128" in said
    assert "--requantize" in said
    done = cli("quantize", source, "-o", tmp_path / "same", "--group-size", "32", "-q")
    assert done.exit_code == 0, done.output
    assert_same(read(tmp_path / "same"), linears)


def test_a_group_size_that_is_never_written_is_refused(tmp_path, refuse):
    source = save(tmp_path / "source", random_linears(group_size=16), gptq.pack, gptq_config(group_size=16))
    assert "quantized with group size 16; 128, 64, 32 and -1 can be written" in refuse(source, format="gptq")


def test_scales_beyond_float16_are_refused(tmp_path, refuse):
    linears = random_linears()

    def pack(layer):
        packed = compressed_tensors.pack(layer)
        packed["weight_scale"] = packed["weight_scale"].bfloat16()
        if layer is linears["model.layers.1.mlp.down_proj"]:
            packed["weight_scale"][5, 3] = 1e-9
        return packed

    said = refuse(save(tmp_path / "source", linears, pack, compressed_config()), format="gptq")
    assert (
        "Error: model.layers.1.mlp.down_proj: 1 of 1024 scales cannot be represented exactly in float16"
        in said
    )


def test_damage_is_named(tmp_path, cli):
    linears = random_linears()

    def pack(layer):
        packed = gptq.pack(layer)
        if layer is linears["model.layers.1.mlp.down_proj"]:
            packed["scales"][0, 0] = float("nan")
        return packed

    source = save(tmp_path / "source", linears, pack, gptq_config())
    result = cli("quantize", source, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "Error: model.layers.1.mlp.down_proj: 1 of 1024 scales are not finite" in result.stderr
    assert not (tmp_path / "out").exists()


def test_tensors_of_another_shape_are_refused(tmp_path, refuse):
    linears = random_linears() | {"model.layers.1.mlp.up_proj": random_linear(128, 320, 0)}
    said = refuse(save(tmp_path / "source", linears, gptq.pack, gptq_config()))
    assert "model.layers.1.mlp.up_proj.qweight has shape (16, 320), its config.json means (16, 256)" in said


@pytest.mark.parametrize("suffix, code", [("weight_packed", "I64"), ("weight_scale", "F8_E5M2")])
def test_tensors_of_another_type_are_refused(tmp_path, refuse, suffix, code):
    def pack(layer):
        packed = compressed_tensors.pack(layer)
        return packed | {suffix: packed[suffix].to({"I64": torch.int64, "F8_E5M2": torch.float8_e5m2}[code])}

    said = refuse(save(tmp_path / "source", random_linears(), pack, compressed_config()))
    assert f"{FIRST}.{suffix} is stored as {code}" in said


@pytest.mark.parametrize("shape", [torch.tensor([128, 127]), torch.tensor([128.0, 0.0])])
def test_a_weight_shape_that_is_none_is_refused(tmp_path, refuse, shape):
    """One group of 127 inputs has as many words and scales as one of 128."""
    linears = random_linears(group_size=-1)
    config = compressed_config(strategy="channel", group_size=None)

    def pack(layer):
        packed = compressed_tensors.pack(layer)
        return packed | ({"weight_shape": shape} if layer is linears[FIRST] else {})

    said = refuse(save(tmp_path / "source", linears, pack, config), format="compressed-tensors")
    assert f"{FIRST}: weight_shape " in said


def test_missing_tensors_are_refused(tmp_path, refuse):
    said = refuse(save(tmp_path / "source", random_linears(), without("scales", gptq.pack), gptq_config()))
    assert f"{FIRST}.scales is not in source" in said


def test_gptq_tensors_called_marlin_are_refused(tmp_path, refuse):
    said = refuse(save(tmp_path / "source", random_linears(), gptq.pack, gptq_config(format="marlin")))
    assert "says marlin, but no tensor of it is called '*.B'" in said and "checkpoint_format" in said


def test_skip_cannot_undo_a_quantization(make, refuse):
    said = refuse(make("gptq")[0], "--skip", "*.down_proj")
    assert "matches model.layers.0.mlp.down_proj, which is quantized in the source" in said


def test_biases_that_are_zero_and_not_of_the_model_are_left_out(tmp_path, refuse):
    linears = random_linears()
    extra = {FIRST: torch.zeros(128).half()}

    def pack(layer):
        bias = next((bias for name, bias in extra.items() if linears[name] is layer), None)
        return gptq.pack(layer) | ({} if bias is None else {"bias": bias})

    source = save(tmp_path / "zero", linears, pack, gptq_config())
    assert_same(read(repack(source, tmp_path / "done", "marlin")), linears)
    extra[FIRST][7] = 0.5
    said = refuse(save(tmp_path / "used", linears, pack, gptq_config()))
    assert f"{FIRST}.bias in used not of the architecture" in said


@pytest.fixture
def with_packed_head(tmp_path):
    """A GPTQ model whose output projection is quantized too."""
    source = save(tmp_path / "source", random_linears(), gptq.pack, gptq_config(lm_head=True))
    head = random_linear(128, 4096, 99)
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors |= {f"lm_head.{suffix}": tensor for suffix, tensor in gptq.pack(head).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source, head


def test_a_quantized_head_is_refused(with_packed_head, refuse):
    said = refuse(with_packed_head[0])
    assert "Error: lm_head is quantized in the source; only the linears of the blocks are repacked" in said
    assert "--requantize" in said


def requantize(cli, source, output, *words):
    command = [
        "quantize",
        source,
        "-o",
        output,
        "--requantize",
        "--samples",
        4,
        "--sequence-length",
        128,
        "-q",
        *words,
    ]
    result = cli(*command)
    assert result.exit_code == 0, result.output
    return json.loads((output / MANIFEST).read_text())


def test_requantizing_writes_a_quantized_head_dense(with_packed_head, cli, tmp_path):
    source, head = with_packed_head
    requantize(cli, source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(written, head.dequantize(torch.float16))
    assert "lm_head.qweight" not in Checkpoint.open(tmp_path / "out").tensors


@pytest.mark.parametrize("source", ["gptq-asymmetric", "gptq-act-order", "gptq-8bit", "awq-asymmetric"])
def test_requantizing_is_the_way_out(make, cli, tmp_path, source):
    directory, linears = make(source)
    manifest = requantize(cli, directory, tmp_path / "out", "--group-size", "64", "--skip", "*.down_proj")
    assert manifest["requantized"] is True
    assert manifest["source"]["quantization"] == Weights(Checkpoint.open(directory)).scheme.format
    assert manifest["recipe"]["group_size"] == 64
    solved = read(tmp_path / "out")
    assert solved.keys() == {name for name in linears if "down_proj" not in name}
    for name, layer in solved.items():
        original = linears[name].dequantize()
        error = (layer.dequantize() - original).norm() / original.norm()
        assert layer.group_size == 64 and layer.zeros is None and error < 0.35
    # what is left dense was quantized before: it is what it stood for
    skipped = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(skipped, linears["model.layers.0.mlp.down_proj"].dequantize(torch.float16))


def test_a_repack_is_planned_without_a_write(make, cli, tmp_path):
    result = cli("quantize", make("gptq")[0], "-o", tmp_path / "out", "--dry-run", "--json", "-v")
    plan = json.loads(result.stdout)
    assert plan["repack"] and "its codes are kept" in " ".join(plan["notes"])
    assert not list(tmp_path.iterdir())


def test_errors_reach_a_caller_of_the_library(make, tmp_path):
    with pytest.raises(ConvertError, match="no zero points"):
        repack(make("gptq-asymmetric")[0], tmp_path / "out", "marlin")
