"""2:4 sparsity from a model to a checkpoint: every quad, in every layout, and what cannot be done."""

import json

import pytest
import rows
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, sha256_file
from marlin_convert.checkpoint.reader import Checkpoint

SHORT = ("--samples", 4, "--sequence-length", 128, "-q")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source") / "model"
    return tiny_models.save(tiny_models.build("llama", torch.bfloat16), directory)


@pytest.fixture(scope="module")
def pruned(model, tmp_path_factory):
    from click.testing import CliRunner

    from marlin_convert.cli.main import main

    output = tmp_path_factory.mktemp("pruned") / "out"
    result = CliRunner().invoke(main, [str(word) for word in ("sparsify", model, "-o", output, *SHORT)])
    assert result.exit_code == 0, result.output
    return output


def linears(directory):
    """The weights (n, k) of the linears of the blocks, dense or dequantized."""
    weights = Weights(Checkpoint.open(directory))
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")]
    names += [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"]
    return {name: weights.read(f"{name}.weight") for name in names}


def crowded_quads(weight):
    """The quads of a weight (n, k) with more than two non-zeros."""
    return [quad for quad in weight.reshape(-1, 4).tolist() if sum(one != 0 for one in quad) > 2]


def report(directory):
    return json.loads((directory / "marlin_convert_verify.json").read_text())


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_every_quad_is_pruned(method, model, tmp_path, cli):
    result = cli("sparsify", model, "-o", tmp_path / "out", "--method", method, *SHORT)
    assert result.exit_code == 0, result.output
    before, after = linears(model), linears(tmp_path / "out")
    for name, weight in after.items():
        assert not len(crowded_quads(weight)) and weight.dtype == before[name].dtype
        if method != "sparsegpt":  # what is kept is as it was
            assert torch.equal(weight, before[name].where(weight != 0, 0))
    if method == "magnitude":
        name, weight = next(iter(after.items()))
        quads = before[name].abs().view(-1, 4)
        assert (quads.sort().values[:, 2:].sum() - weight.abs().sum()).abs() < 1e-2
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert rows.is_sparse(manifest) and manifest["recipe"]["method"] == method
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_any_tool_loads_it(pruned):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    for name, weight in linears(pruned).items():
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), weight)


def test_sparsegpt_is_nearer_than_magnitude(model, pruned, tmp_path, cli):
    cli("sparsify", model, "-o", tmp_path / "out", "--method", "magnitude", *SHORT)
    errors = [
        sum(row["error"] for row in rows.worked_on(json.loads((directory / MANIFEST).read_text())))
        for directory in (pruned, tmp_path / "out")
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("format", ["marlin-24", "gptq", "compressed-tensors", "marlin"])
def test_quantize_prunes_and_verify_counts(format, model, tmp_path, cli):
    output = tmp_path / "out"
    words = ("--sparsity", "2:4", "--format", format)
    assert cli("quantize", model, "-o", output, *words, *SHORT).exit_code == 0
    for weight in linears(output).values():
        assert not len(crowded_quads(weight))
    manifest = json.loads((output / MANIFEST).read_text())
    assert rows.is_sparse(manifest) and "sparsity_config" not in (output / "config.json").read_text()
    assert manifest["bits_per_weight"] == (3.125 if format == "marlin-24" else pytest.approx(4.2, abs=0.2))
    result = cli("verify", output, "--checks", "files,layout,sparsity,numbers")
    assert result.exit_code == 0 and "100.00 % of" in result.output and report(output)["passed"]


def test_marlin_24_is_what_sparsity_means(model, tmp_path, cli):
    assert cli("quantize", model, "-o", tmp_path / "out", "--sparsity", "2:4", *SHORT).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "marlin_24"


def test_the_method_is_that_of_sparsify(model, tmp_path, cli):
    """Quantizing chooses mask and codes together, whatever the recipe says of it."""
    (tmp_path / "wanda.yaml").write_text("method: wanda")
    for recipe in ("w4a16", tmp_path / "wanda.yaml"):
        words = ("-o", tmp_path / f"{recipe}.out", "--recipe", recipe, "--sparsity", "2:4", *SHORT)
        assert cli("quantize", model, *words).exit_code == 0
    one, other = (directory / "model.safetensors" for directory in tmp_path.glob("*.out"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("format", ["marlin-24", "gptq"])
def test_a_pruned_model_keeps_its_zeros(format, pruned, tmp_path, cli):
    output = tmp_path / "out"
    assert cli("quantize", pruned, "-o", output, "--format", format, *SHORT).exit_code == 0
    before, after = linears(pruned), linears(output)
    assert all(not ((after[name] != 0) & (before[name] == 0)).any() for name in before)
    assert rows.is_sparse(json.loads((output / MANIFEST).read_text()))


def test_a_part_is_left_as_it_is(model, tmp_path, cli):
    output = tmp_path / "out"
    words = ("--skip", "*.0.mlp.down_proj", "--unpruned", "*.1.mlp.down_proj")
    result = cli("quantize", model, "-o", output, "--sparsity", "2:4", *words, *SHORT)
    assert result.exit_code == 0, result.output
    manifest = json.loads((output / MANIFEST).read_text())
    assert list(rows.dense(manifest)) == ["model.layers.0.mlp.down_proj"]
    assert list(rows.unpruned(manifest)) == ["model.layers.1.mlp.down_proj"]
    after = linears(output)
    for name, weight in after.items():
        assert bool(len(crowded_quads(weight))) == name.endswith("mlp.down_proj")
    assert cli("verify", output, "--checks", "files,layout,sparsity,numbers").exit_code == 0
    pruned = tmp_path / "pruned"
    assert cli("sparsify", model, "-o", pruned, "--skip", "*.0.mlp.down_proj", *SHORT).exit_code == 0
    assert len(crowded_quads(linears(pruned)["model.layers.0.mlp.down_proj"]))
    assert (
        "left as they are: model.layers.0.mlp.down_proj"
        in cli("sparsify", model, "-o", tmp_path / "x", "--skip", "*.0.mlp.down_proj", *SHORT[:4]).output
    )


def test_a_claim_that_is_not_true(pruned, tmp_path, cli):
    """A weight put back by hand: verify and quantize both name the linear and the quad."""
    import shutil

    broken = shutil.copytree(pruned, tmp_path / "broken")
    name = "model.layers.1.self_attn.k_proj.weight"
    (shard,) = broken.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[name][7, 40:44] = 1
    save_file(tensors, shard, metadata={"format": "pt"})
    manifest = json.loads((broken / MANIFEST).read_text())
    manifest["files"][shard.name] = {"sha256": sha256_file(shard), "size": shard.stat().st_size}
    (broken / MANIFEST).write_text(json.dumps(manifest))
    result = cli("quantize", broken, "-o", tmp_path / "out", *SHORT)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    place = "the first, inputs 40 to 43 of output 7"
    assert (
        "self_attn.k_proj is said to be 2:4 and is not: 1 quads" in result.output and place in result.output
    )
    result = cli("verify", broken)
    assert result.exit_code == 3 and place in result.output and "99.99 % of" in result.output


def test_what_cannot_be_done_is_said_before_work(model, pruned, tmp_path, cli):
    packed = tmp_path / "packed"
    assert cli("quantize", model, "-o", packed, *SHORT).exit_code == 0
    for words, said in (
        (("sparsify", packed, "-o", tmp_path / "out"), "quantized already (marlin)"),
        (
            ("quantize", packed, "-o", tmp_path / "out", "--sparsity", "2:4", "--format", "gptq"),
            "does not prune",
        ),
        (("quantize", model, "-o", tmp_path / "out", "--format", "marlin-24"), "--sparsity 2:4"),
        (
            ("quantize", model, "-o", tmp_path / "out", "--sparsity", "2:4", "--group-size", "64"),
            "--group-size auto packs 14 of 14 linears",
        ),
        (("sparsify", model, "-o", tmp_path / "out", "--skip", "*"), "nothing is left to do"),
        (("sparsify", tmp_path / "nowhere", "-o", tmp_path / "out"), "nowhere"),
        (("sparsify", model, "-o", pruned), "not empty"),
    ):
        result = cli(*words)
        assert result.exit_code == 1 and said in result.output, result.output
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert cli("sparsify", model, "-o", tmp_path / "out", "--method", "best").exit_code == 2


def test_the_plan_and_inspect(model, pruned, tmp_path, cli):
    result = cli("sparsify", model, "-o", tmp_path / "out", "--dry-run")
    assert "to 2:4 by sparsegpt" in result.stdout and "14 linears in 2 blocks pruned" in result.stdout
    result = cli(
        "quantize", model, "-o", tmp_path / "out", "--sparsity", "2:4", "--format", "gptq", "--dry-run"
    )
    assert "bits per weight, 2:4" in result.stdout and "ordinary int4" in result.stdout
    plan = json.loads(cli("sparsify", model, "-o", tmp_path / "out", "--dry-run", "--json", "-v").stdout)
    assert plan["sparsity"] == "2:4" and all(one["format"] == "dense" for one in rows.worked_on(plan))
    assert not list(tmp_path.iterdir())
    assert "14 linears, dense" in cli("inspect", pruned).stdout
    assert cli("verify", pruned).exit_code == 0


def test_an_interrupted_run_ends_the_same(model, pruned, tmp_path, monkeypatch, cli):
    from marlin_convert.solve import Solve

    block = Solve.block

    def broken(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return block(self, number)

    monkeypatch.setattr(Solve, "block", broken)
    assert cli("sparsify", model, "-o", tmp_path / "out", *SHORT).exit_code == 130
    monkeypatch.undo()
    assert cli("sparsify", model, "-o", tmp_path / "out", "--resume", *SHORT).exit_code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes()
